"""The peers, in PyTorch: a child process that reads one JSON command a line and answers one JSON line each.

Run by path with an interpreter that has torch; knows nothing of dina. Commands: {"setup": NAME, "config": {...},
"weights": FILE, "device": "cuda" if not the CPU} builds a workload, {"threads": N} sets threads, {"run": true} runs it once and answers its seconds,
{"result": FILE} saves what the last run computed, {"peak": true} answers the bytes that one more run needs at its peak.
"""

import importlib.metadata
import json
import sys
import time

import peak
import peer_audio
import safetensors.torch
import torch


class LongcatFlash:
    """transformers' LongcatFlashForCausalLM with released weight names, scaled dot product attention."""

    def __init__(self, config, weights):
        import transformers

        known = {k: v for k, v in config.items() if k not in ("rope_theta", "bench")}
        hf = transformers.LongcatFlashConfig(
            **known, head_dim=config["qk_rope_head_dim"], rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        hf._attn_implementation = "sdpa"
        self.model = transformers.LongcatFlashForCausalLM(hf).eval().to(next(iter(weights.values())).device)
        self._load(config, weights)

    def _load(self, config, weights):
        state, real = {}, config["n_routed_experts"]
        stacked = {}
        for name, tensor in weights.items():
            if ".mlp.experts." in name:
                base, rest = name.split(".mlp.experts.")
                expert, part = rest.split(".")[:2]
                stacked.setdefault(base, {})[int(expert), part] = tensor
            else:
                state[name] = tensor
        for base, found in stacked.items():
            both = [torch.cat([found[e, "gate_proj"], found[e, "up_proj"]]) for e in range(real)]
            both += [torch.zeros_like(both[0])] * config["zero_expert_num"]  # the class allocates them
            state[f"{base}.mlp.experts.gate_up_proj"] = torch.stack(both)
            state[f"{base}.mlp.experts.down_proj"] = torch.stack([found[e, "down_proj"] for e in range(real)])
        missing, extra = self.model.load_state_dict(state, strict=False)
        if missing or extra:
            raise ValueError(f"peer weights: missing {missing}, unknown {extra}")


class LmForward(LongcatFlash):
    """Logits of a batch."""

    def run(self, weights):
        return self.model(input_ids=weights["input_ids"], use_cache=False).logits


class LmDecode(LongcatFlash):
    """Greedy ids after a prompt with the model's own cache."""

    def __init__(self, config, weights):
        self.new = config["bench"]["new"]
        super().__init__({k: v for k, v in config.items() if k != "bench"}, weights)

    def run(self, weights):
        prompt = weights["input_ids"]
        return self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=self.new, max_new_tokens=self.new, pad_token_id=0
        )[:, prompt.shape[1] :]


class Ngram:
    """golden/README.md §2's rule (no specials) in plain PyTorch: 64-bit hashes, one embedding and one projection a table."""

    def __init__(self, config, weights):
        self.order, self.splits, self.vocab, self.eos = config["order"], config["splits"], config["vocab"], config["eos"]
        self.sizes = config["sizes"]
        self.tables = [weights[f"table.{i}"] for i in range(len(self.sizes))]
        self.proj = [weights[f"proj.{i}"] for i in range(len(self.sizes))]
        self.word = weights["word"]
        self.powers = [[pow(self.vocab, d, m) for d in range(self.order)] for m in self.sizes]

    def run(self, weights):
        ids = weights["input_ids"].long()
        context, alive = [ids], torch.ones_like(ids, dtype=torch.bool)
        for d in range(1, self.order):
            before = torch.nn.functional.pad(ids, (d, 0))[:, : ids.shape[1]]
            alive = alive & (before != self.eos)
            context.append(torch.where(alive, before, 0))
        x = torch.nn.functional.embedding(ids, self.word)
        for i, size in enumerate(self.sizes):
            order = 2 + i // self.splits
            row = sum(context[d] * self.powers[i][d] for d in range(order)) % size
            part = torch.nn.functional.embedding(row, self.tables[i]) * (row > 0)[..., None]
            x = x + torch.nn.functional.linear(part, self.proj[i])
        return x / (1 + len(self.sizes))


class DepthHead:
    """backbone.md §4 in plain PyTorch, greedy: all rows recomputed at every level, as the reference does."""

    def __init__(self, config, weights):
        self.c, self.levels = config, len(config["sizes"])
        w = self.w = dict(weights)
        d, levels = config["width"], self.levels
        for i in range(config["layers"]):
            base = f"head.transformer_layers.{i}"
            w[f"{i}.in"] = w.pop(f"{base}.linear1.weight").view(-1, levels, d).permute(1, 0, 2).contiguous()
            w[f"{i}.out"] = w.pop(f"{base}.linear2.weight").view(d, levels, -1).permute(1, 0, 2).contiguous()

    def _norm(self, x, name):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.w[name], 1e-6)

    def _layer(self, x, i):
        base, w, linear = f"head.transformer_layers.{i}", self.w, torch.nn.functional.linear
        u, heads = self._norm(x, f"{base}.layernorm1.weight"), self.c["heads"]
        split = lambda name: linear(u, w[f"{base}.self_attention.{name}.weight"], w.get(f"{base}.self_attention.{name}.bias")).view(
            *u.shape[:2], heads, -1).transpose(1, 2)  # fmt: skip
        y = torch.nn.functional.scaled_dot_product_attention(split("q_proj"), split("k_proj"), split("v_proj"), is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(x.shape), w[f"{base}.self_attention.out_proj.weight"], w[f"{base}.self_attention.out_proj.bias"])
        u, n = self._norm(x, f"{base}.layernorm2.weight"), x.shape[1]
        hidden = torch.nn.functional.gelu(torch.einsum("bld,lfd->blf", u, w[f"{i}.in"][:n]))
        return x + torch.einsum("blf,ldf->bld", hidden, w[f"{i}.out"][:n])

    def run(self, weights):
        rows, codes = [weights["hidden"]], []
        for level in range(self.levels):
            x = torch.stack(rows, 1)
            x = torch.nn.functional.linear(self._norm(x, "head.hidden_norm.weight"), self.w["head.hidden_proj.weight"])
            for i in range(self.c["layers"]):
                x = self._layer(x, i)
            x = self._norm(x[:, level], "head.headnorm.weight")
            logits = torch.nn.functional.linear(x, self.w[f"head.heads.{level}.weight"], self.w[f"head.heads.{level}.bias"])
            codes.append(logits[:, :-1].argmax(-1))
            embedded = self.w[f"embedding.{level}"][codes[-1]]
            rows.append(embedded if level == 0 else rows[-1] + embedded)
        return torch.stack(codes, 1)


class RvqFormula:
    """The released search (tokenizers.md A.4) and, for a training step, moving averages by `index_add_` and restarts, in place."""

    def __init__(self, config, weights):
        self.c, levels = config, range(config["levels"])
        self.books = [weights.pop(f"book.{i}") for i in levels]
        if "decay" in config:
            self.counts = [first_counts(config) for _ in levels]
            self.sums = [book * count[:, None] for book, count in zip(self.books, self.counts)]

    def search(self, x, book):
        distance = (x.pow(2).sum(1, keepdim=True) + book.pow(2).sum(1)) - 2 * (x @ book.t())
        return distance.argmin(1)

    def run(self, weights):
        residual, codes = weights["hidden"], []
        for level, book in enumerate(self.books):
            code = self.search(residual, book)
            row = book[code]
            if "decay" in self.c:
                self.update(level, residual, code)
            residual = residual - row
            codes.append(code)
        codes = torch.stack(codes, 1)
        return codes if "decay" not in self.c else probe(self.c, codes, self.books, self.counts)

    def update(self, level, x, code):
        book, total, count, keep = self.books[level], self.sums[level], self.counts[level], self.c["decay"]
        count.mul_(keep).index_add_(0, code, torch.full_like(code, 1 - keep, dtype=count.dtype))
        total.mul_(keep).index_add_(0, code, x, alpha=1 - keep)
        mass = count.sum()
        torch.div(total, ((count + self.c["eps"]) / (mass + len(count) * self.c["eps"]) * mass)[:, None], out=book)
        dead = torch.nonzero(count < self.c["threshold"] * mass / len(count))[:, 0]
        if len(dead):
            fresh = x[torch.randint(len(x), (len(dead),))]
            book[dead], total[dead], count[dead] = fresh, fresh * self.c["threshold"], self.c["threshold"]


class RvqLibrary:
    """vector-quantize-pytorch's ResidualVQ with its own training when the config has a decay."""

    def __init__(self, config, weights):
        import vector_quantize_pytorch

        self.c = config
        training = {"decay": config["decay"], "eps": config["eps"], "threshold_ema_dead_code": config["threshold"]} if "decay" in config else {}
        dim = weights["book.0"].shape[1]
        self.model = vector_quantize_pytorch.ResidualVQ(dim=dim, num_quantizers=config["levels"], codebook_size=config["codes"], **training)
        self.model.train("decay" in config)
        for i, layer in enumerate(self.model.layers):
            layer._codebook.embed = weights.pop(f"book.{i}")[None]
            if training:
                layer._codebook.cluster_size = first_counts(config)[None]
                layer._codebook.embed_avg = layer._codebook.embed * layer._codebook.cluster_size[..., None]

    def run(self, weights):
        codes = self.model(weights["hidden"][None])[1][0]
        if "decay" not in self.c:
            return codes
        books = [layer._codebook for layer in self.model.layers]
        return probe(self.c, codes, [book.embed[0] for book in books], [book.cluster_size[0] for book in books])


def first_counts(config):
    """One hit for every code but the dead ones."""
    alive = config["codes"] - config["dead"]
    return torch.cat([torch.ones(alive), torch.full((config["dead"],), config["dead_count"])])


def probe(config, codes, books, counts):
    """Codes, sums of some rows of each book, and counts of codes that were alive, in one vector."""
    alive = config["codes"] - config["dead"]
    return torch.cat([codes.flatten().float(), *(book[: config["probe"]].sum(1) for book in books), *(count[:alive] for count in counts)])


WORKLOADS = {
    "lm_forward": LmForward, "lm_decode": LmDecode, "ngram": Ngram, "depth_head": DepthHead, "rvq_encode_formula": RvqFormula,
    "rvq_encode_library": RvqLibrary, "rvq_train_step_formula": RvqFormula, "rvq_train_step_library": RvqLibrary,
} | peer_audio.WORKLOADS  # fmt: skip
LIBRARIES = "transformers", "vector-quantize-pytorch"


def main():
    """Answers commands until standard input ends."""
    answer = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not end up between answers
    work, weights, last, device = None, {}, None, "cpu"
    for line in sys.stdin:
        command, reply = json.loads(line), {}
        with torch.inference_mode():
            if "setup" in command:
                device = command.get("device", "cpu")
                weights = safetensors.torch.load_file(command["weights"], device)
                inputs = {k: weights.pop(k) for k in ("input_ids", "hidden") if k in weights}
                work = WORKLOADS[command["setup"]](command["config"], weights)
                weights = inputs
                reply = {"torch": torch.__version__} | {
                    name: importlib.metadata.version(name) for name in LIBRARIES if name.replace("-", "_") in sys.modules
                }
            if "threads" in command:
                torch.set_num_threads(command["threads"])
            if "run" in command:
                start = time.perf_counter()
                last = work.run(weights)
                if device == "cuda":
                    torch.cuda.synchronize()
                reply["seconds"] = time.perf_counter() - start
            if "peak" in command:
                last, reply["bytes"] = peak.above(lambda: work.run(weights))
            if "result" in command:
                safetensors.torch.save_file({"result": last.cpu().contiguous()}, command["result"])
        print(json.dumps(reply), file=answer, flush=True)


if __name__ == "__main__":
    main()
