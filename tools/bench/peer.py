"""The peers, in PyTorch: a child process that reads one JSON command a line and answers one JSON line each.

Run by path with an interpreter that has torch; knows nothing of dina. Commands: {"setup": NAME, "config": {...},
"weights": FILE, "device": "cuda" if not the CPU} builds a workload, {"threads": N} sets threads, {"run": true} runs it once and answers its seconds,
{"result": FILE} saves what the last run computed.
"""

import json
import sys
import time

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


WORKLOADS = {"lm_forward": LmForward, "lm_decode": LmDecode, "ngram": Ngram, "depth_head": DepthHead}


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
                reply = {"torch": torch.__version__, "transformers": getattr(sys.modules.get("transformers"), "__version__", "")}
            if "threads" in command:
                torch.set_num_threads(command["threads"])
            if "run" in command:
                start = time.perf_counter()
                last = work.run(weights)
                if device == "cuda":
                    torch.cuda.synchronize()
                reply["seconds"] = time.perf_counter() - start
            if "result" in command:
                safetensors.torch.save_file({"result": last.cpu().contiguous()}, command["result"])
        print(json.dumps(reply), file=answer, flush=True)


if __name__ == "__main__":
    main()
