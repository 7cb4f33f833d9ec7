"""The recordings data set on small fake package trees: transcripts, what is left out, and who may be in which split."""

import collections
import gzip
import json

import ml_collections
import numpy as np
import pytest

from dina import grammar, stages
from dina.config import InputError
from dina.data import clips, codes, documents, packages, packing, recordings, sources, stamps, voices
from dina.text import tokenizer as text
from tests.data import mixture
from tests.data.sounds import encode, tone

LANGUAGES = {"fr": "Une bête {}.", "ru": "Зверь {}.", "en": None}
STAMPS = {f"tuxpaint/animals/beast{i}": (("train", "valid", "test")[i % 3], f"A beast called {chr(97 + i)}x.") for i in range(12)}


def sound(number, form="OGG"):
    return encode(tone(0.2 + 0.01 * number, 22050, 200 + 20 * number), 22050, form)


def write(root, files):
    for name, content in files.items():
        path = root / "usr/share" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder per package, as `packages.fetch` gives it."""
    root, at = tmp_path_factory.mktemp("tree"), "tuxpaint/stamps"
    tux, number = {}, 0
    for i, (source, (_, caption)) in enumerate(STAMPS.items()):
        name = source.replace("tuxpaint", at, 1)
        words = "\n".join(f"{language}.utf8={text.format(i)}" for language, text in LANGUAGES.items() if text)
        tux[f"{name}.txt"] = f"{caption}\n{words}\n"
        for language in LANGUAGES:
            tux[f"{name}_desc{'' if language == 'en' else '_' + language}.ogg"] = sound(number := number + 1)
    tux[f"{at}/animals/beast0_desc_de.ogg"] = sound(99)  # no line de.utf8=
    tux[f"{at}/animals/beast2_desc_ru.ogg"] = tux[f"{at}/animals/beast3_desc_ru.ogg"]  # test and train: one recording
    # beast4 (valid) and beast6 (train) are called the same in French.
    tux[f"{at}/animals/beast6.txt"] = tux[f"{at}/animals/beast6.txt"].replace("bête 6", "BÊTE  4")
    # A stamp that the pictures' data set left out, with the caption of beast5, and one that nothing is known of.
    tux |= {f"{at}/copy.txt": "The beast called fx\nfr.utf8=Autre.\n", f"{at}/copy_desc_fr.ogg": sound(97),
            f"{at}/new.txt": "New.\nfr.utf8=Neuf.\n", f"{at}/new_desc_fr.wav": sound(98, "WAV")}
    write(root / "stamps", tux)
    prompts = {f"prompt{i}": f"Prompt number {i}." for i in range(20)} | {"beep": "[a tone]", "letters/at": "at [@]", "torn": "Torn."}
    for language in ("en", "es"):
        lines = "".join(f"{name}: {language} {text}\n" if "[" not in text else f"{name}: {text}\n" for name, text in prompts.items())
        write(root / f"{language}-texts", {f"doc/x/core-sounds-{language}.txt.gz": gzip.compress(f"; Sounds\n\n{lines}".encode())})
        rng = np.random.default_rng(len(language) + ord(language[1]))
        write(root / f"{language}-sounds", {f"asterisk/sounds/{language}_US_f_Ann/{name}.g722": b"" if name == "torn" else
                                            rng.integers(0, 256, 2000, np.uint8).tobytes() for name in [*prompts, "extra"]})
    game = "games/fillets-ng"
    dialogs = lambda language: "".join(
        f'dialogId("d-{i}", "font_big",\n "English {i}")\ndialogStr(\n"{language} \\"line\\" {i}")\n\n' for i in range(20))
    write(root / "texts", {f"{game}/script/city/dialogs_{language}.lua": dialogs(language) for language in ("cs", "nl")})
    for language in ("cs", "nl"):
        write(root / language, {f"{game}/sound/city/{language}/d-{i}.ogg": sound(40 + i + 20 * (language == "nl")) for i in range(21)})
    return root


def use(tree, patch):
    def fetch(package, data_dir):
        short = package.name.removeprefix("asterisk-core-sounds-").removeprefix("fillets-ng-data").lstrip("-")
        return tree / {"tuxpaint-stamps-default": "stamps", "": "texts", "en": "en-texts", "es": "es-texts",
                       "en-g722": "en-sounds", "es-g722": "es-sounds"}.get(short, short)

    patch.setattr(packages, "fetch", fetch)
    patch.setattr(stamps, "prepare", lambda config, data_dir=None: None)
    rows = lambda split: [{"source": s, "caption": c, "split": split} for s, (own, c) in STAMPS.items() if own == split]
    patch.setattr(stamps, "open_records", lambda config, kind, split, data_dir=None, skip=(): rows(split))


def options(**changes):
    config = ml_collections.ConfigDict({"data": recordings.default_config()})
    config.data.update({"packages": ("tuxpaint", "asterisk-en", "asterisk-es", "fillets"), "shares": {"valid": 0.2, "test": 0.2}} | changes)
    return config


@pytest.fixture(scope="module")
def made(tree, tmp_path_factory):
    config, data_dir = options(), tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        use(tree, patch)
        sources.prepare(config, data_dir)
        yield config, data_dir


def records(made):
    return {note["source"]: (split, note) for split in clips.SPLITS
            for note in recordings.open_records(made[0], "speech", split, made[1]).notes}


def test_transcripts_languages_and_speakers(made):
    found = records(made)
    for source, text, language, speaker, picture in (
        ("tuxpaint/animals/beast1_desc_fr", "Une bête 1.", "fr", "tuxpaint-fr", "tuxpaint/animals/beast1"),
        ("tuxpaint/animals/beast7_desc_en", "A beast called hx.", "en", "tuxpaint-en", "tuxpaint/animals/beast7"),
        ("asterisk-es/prompt3", "es Prompt number 3.", "es", "asterisk-Ann", ""), ("asterisk-en/letters/at", "at", "en", "asterisk-Ann", ""),
        ("fillets/city/nl/d-4", 'nl "line" 4', "nl", "fillets-nl-big", ""), ("tuxpaint/new_desc_fr", "Neuf.", "fr", "tuxpaint-fr", "tuxpaint/new"),
    ):  # fmt: skip
        note = found[source][1]
        assert (note["text"], note["language"], note["speaker"], note["picture"]) == (text, language, speaker, picture)


def test_what_is_left_out_is_counted_with_its_reason(made):
    lines = json.loads((recordings.cache_path(*made) / "left_out.json").read_text())
    assert recordings.manifest(*made)["left_out"] == {reason: len(names) for reason, names in lines.items()}
    reasons = {name.split(":")[0]: reason for reason, names in lines.items() for name in names}
    assert reasons == {
        "tuxpaint/animals/beast0_desc_de": "no transcript", "asterisk-en/beep": "no transcript", "asterisk-es/beep": "no transcript",
        "asterisk-en/extra": "no transcript", "asterisk-es/extra": "no transcript", "asterisk-en/torn": "refused",
        "asterisk-es/torn": "refused", "fillets/city/cs/d-20": "no transcript", "fillets/city/nl/d-20": "no transcript",
        "tuxpaint/animals/beast3_desc_ru": "in two splits", "tuxpaint/animals/beast6_desc_fr": "in two splits",
    }


def test_clips_are_where_their_picture_is(made):
    found = records(made)
    for source, (split, note) in found.items():
        if note["picture"] in STAMPS:
            assert split == STAMPS[note["picture"]][0], source
    assert found["tuxpaint/copy_desc_fr"][0] == STAMPS["tuxpaint/animals/beast5"][0] == "test"
    assert found["tuxpaint/animals/beast2_desc_ru"][0] == "test"


def test_splits_share_no_text_sound_or_prompt(made):
    split_of, waves = {}, {}
    for split in clips.SPLITS:
        opened = recordings.open_records(made[0], "speech", split, made[1])
        for i in range(len(opened)):
            one = opened[i]
            prompt = one["source"].replace("asterisk-en", "asterisk-es").replace("/cs/", "/nl/")
            for key in ((one["language"], voices.said(one["text"])), prompt):
                assert split_of.setdefault(key, split) == split
            assert waves.setdefault(one["audio24"].tobytes(), split) == split
    per_split = collections.Counter(split for key, split in split_of.items() if "asterisk" in key)
    for split in ("test", "valid"):  # 0.2 of 22 prompts, both languages of each; one is torn
        assert 3 <= per_split[split] <= 4


def test_triples_name_clip_and_picture(made):
    pairs = recordings.triples(made[0], "test", made[1])
    heard, seen = (recordings.open_records(made[0], kind, "test", made[1]) for kind in ("speech", "images"))
    assert len(pairs) == 12  # four stamps in three languages; the copy has no picture
    for clip, picture in pairs:
        assert heard[clip]["picture"] == seen[picture]["source"]


def test_the_same_again_and_another_key_for_another_seed(made, tree, tmp_path, monkeypatch):
    use(tree, monkeypatch)
    again = sources.prepare(made[0], tmp_path)
    for split in clips.SPLITS:
        for kind in ("jsonl", "array_record"):
            name = f"{split}.{kind}"
            assert (again / name).read_bytes() == (recordings.cache_path(*made) / name).read_bytes()
    assert recordings.cache_path(options(seed=1), tmp_path).name != again.name


def test_without_pictures_texts_alone_decide(tree, tmp_path, monkeypatch, capsys):
    use(tree, monkeypatch)
    config = options(packages=("tuxpaint",))
    config.data.pictures = ml_collections.ConfigDict()
    sources.prepare(config, tmp_path)
    assert "train" in capsys.readouterr().out
    found = records((config, tmp_path))
    # Stamps that share a recording or a text are together, so nothing is left out.
    assert found["tuxpaint/animals/beast2_desc_ru"][0] == found["tuxpaint/animals/beast3_desc_ru"][0]
    assert len(found) == 38 and len({split for split, _ in found.values()}) == 3
    with pytest.raises(InputError, match="data.pictures is empty"):
        sources.open_source(config, "images", "train", tmp_path)


def test_bad_options_are_named_and_leave_nothing(tree, tmp_path, monkeypatch):
    use(tree, monkeypatch)
    with pytest.raises(InputError, match="data.packages"):
        sources.prepare(options(packages=("tuxpaint", "librivox")), tmp_path)
    with pytest.raises(InputError, match="3 recordings are too few"):
        sources.prepare(options(packages=("asterisk-en",), limit=3), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="dina.data.recordings.prepare"):
        sources.open_source(options(), "speech", "test", tmp_path)


def language(made, workdir, **changes):
    """(experiment with a language stage, its stage), and codes of all training records in `workdir`."""
    config, data_dir = made[0].copy_and_resolve_references(), made[1]
    config.update({"seed": 3, "run": {"data_dir": str(data_dir)}, "text": text.default_config().to_dict() | {"vocab_size": 330},
                   "audio": {"quantizer": {"sizes": mixture.LEVELS["audio"]}},
                   "vision": {"quantizer": {"sizes": mixture.LEVELS["visual"]}, "patch": 14, "merge": 2, "max_pixels": 16 * 28 * 28}})
    stage = stages.default_stage()
    stage.task, stage.batch = "language", 4
    stage.options = ml_collections.ConfigDict({"pack": {"window": 64}, "voice_share": 0.5, "segments_share": 0.5} | changes)
    config.stages = ml_collections.ConfigDict({"pretrain": stage})
    notes = recordings.open_records(config, "speech", "train", data_dir).notes
    heard = [{name: note[name] for name in codes.FIELDS["speech"] if name in note} | {
        "noisy": noisy, "record": i, "codes": mixture._numbered(2 * i + noisy, 3 + i % 20, mixture.LEVELS["audio"])}
        for i, note in enumerate(notes) for noisy in (0, 1)]  # fmt: skip
    seen = [{"h": 2, "w": 2, "source": source, "caption": caption, "record": i, "codes": mixture._numbered(i, 4, mixture.LEVELS["visual"])}
            for i, (source, (split, caption)) in enumerate(STAMPS.items()) if split == "train"]
    for kind, records in (("speech", heard), ("images", seen)):
        codes.write_shard(codes.shard_path(workdir, kind, "train", 0, 1), kind, records, "one")
        codes.finish(workdir, kind, len(mixture.LEVELS["audio" if kind == "speech" else "visual"]), {"train": 1})
    return config, stage


def test_a_language_stage_reads_text_speech_and_triples(made, tmp_path):
    config, stage = language(made, tmp_path)
    batches, again = (packing.open_batches(config, stage, tmp_path) for _ in range(2))
    batch, (vocabulary, tokenizer) = batches.batch(3), packing.open_vocabulary(config)
    assert all((batch[name] == again.batch(3)[name]).all() for name in batch)
    assert set(batch["kind"].ravel()) - {-1} == set(range(len(documents.KINDS))) and batches.vocabulary == vocabulary
    said = {note["text"] for _, note in records(made).values()}
    row = {name: batch[name][0][batch["segment"][0] == 1] for name in ("tokens", "transcript", "codes", "text_weight")}
    assert grammar.decode(row, vocabulary)
    for sample in (batches.documents(n) for n in range(60)):
        for span in sample.document:
            if isinstance(span, grammar.Speech) and span.target:
                assert tokenizer.decode(span.transcript).strip() in said
    folder, = made[1].glob("text-*")
    stamp = (folder / "tokenizer.model").stat().st_mtime_ns
    packing.open_vocabulary(config)
    assert (folder / "tokenizer.model").stat().st_mtime_ns == stamp and tokenizer.specials == vocabulary.ids


def test_a_language_stage_without_pictures_or_text_says_so(made, tmp_path):
    config, stage = language(made, tmp_path)
    config.data.name = "stamps"
    with pytest.raises(InputError, match="documents of data set 'stamps' does not exist"):
        packing.open_batches(config, stage, tmp_path)
    with pytest.raises(InputError, match="data.name: 'stamps' has no text tokenizer.*recordings"):
        sources.open_tokenizer(config)
