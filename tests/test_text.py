"""text.py against transformers itself, on tiny random LMs and on the packaged all-MiniLM-L6-v2."""

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from minimuse import text
from minimuse.text import MINILM, Context, TextEncoder, pad_contexts

PROMPTS = ["a red sphere", "", "two small blue cubes left of a large green cylinder", "a shiny crimson ball"]
KINDS = ["t5", "bert", "albert", "clip"]
packaged = pytest.mark.skipif(importlib.util.find_spec(text.MINILM_PACKAGE) is None, reason="needs the extra `offline`")


def reference(folder: str, kind: str, prompt: str) -> torch.Tensor:
    """(L, D_lm) of one prompt by transformers alone."""
    import transformers as tf

    classes = {"t5": tf.T5EncoderModel, "bert": tf.BertModel, "albert": tf.AlbertModel, "clip": tf.CLIPTextModel}
    tokens = tf.AutoTokenizer.from_pretrained(folder)([prompt], return_tensors="pt")
    with torch.no_grad():
        lm = classes[kind].from_pretrained(folder, dtype=torch.float32).eval()
        return lm(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state[0]


def count_calls(encoder: TextEncoder, monkeypatch) -> list[int]:
    """The batch sizes that the LM gets from now on."""
    calls, forward = [], encoder._lm.forward

    def counted(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(encoder._lm, "forward", counted)
    return calls


class TestContext:
    def test_pad_contexts(self):
        context = pad_contexts([torch.ones(2, 3), torch.ones(4, 3), torch.ones(0, 3)])
        assert context.embeds.shape == (3, 4, 3)
        assert context.mask.tolist() == [[True, True, False, False], [True] * 4, [False] * 4]
        assert (context.embeds.sum(-1) > 0).equal(context.mask)

    def test_pad_contexts_of_nothing(self):
        with pytest.raises(ValueError, match="no prompts"):
            pad_contexts([])

    def test_cat_pads_and_repacks(self):
        short, long = pad_contexts([torch.ones(2, 3)]), pad_contexts([torch.ones(4, 3), torch.ones(1, 3)])
        both = Context.cat([short, long])
        assert both.mask.sum(1).tolist() == [2, 4, 1]
        assert both.embeds.shape == (3, 4, 3)

    def test_to(self):
        context = pad_contexts([torch.ones(2, 3)]).to("cpu", torch.bfloat16)
        assert context.embeds.dtype == torch.bfloat16
        assert context.mask.dtype == torch.bool
        assert context.to("meta").mask.device.type == "meta"
        assert context.to(dtype=torch.float32).embeds.dtype == torch.float32


class TestAgainstTransformers:
    @pytest.mark.parametrize("kind", KINDS)
    def test_same_numbers(self, tiny_lms, kind):
        encoder = TextEncoder(tiny_lms[kind])
        context = encoder.encode(PROMPTS)
        assert context.embeds.shape == (*context.mask.shape, 16)
        for row, mask, prompt in zip(context.embeds, context.mask, PROMPTS, strict=True):
            assert_close(row[mask], reference(tiny_lms[kind], kind, prompt), atol=1e-5, rtol=1e-4)

    def test_t5_keeps_the_encoder_half_only(self, tiny_lm):
        encoder = TextEncoder(tiny_lm)
        encoder.encode(["a cube"])
        assert type(encoder._lm).__name__ == "T5EncoderModel"
        assert not any(name.startswith("decoder") for name, _ in encoder._lm.named_parameters())

    def test_whole_clip_gives_its_text_half(self, tmp_path, tiny_lms):
        import transformers as tf

        shutil.copytree(tiny_lms["clip"], tmp_path / "clip")
        text_config = tf.CLIPTextConfig.from_pretrained(tiny_lms["clip"]).to_dict()
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        vision |= {"image_size": 8, "patch_size": 4}
        lm = tf.CLIPModel(tf.CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=8))
        lm.save_pretrained(tmp_path / "clip")
        encoder = TextEncoder(tmp_path / "clip")
        ids = torch.tensor(encoder._tokenizer(["a cube"])["input_ids"])
        assert_close(encoder.encode(["a cube"]).embeds, lm.eval().text_model(ids).last_hidden_state.detach())


class TestEncode:
    @pytest.mark.parametrize("kind", KINDS)
    def test_alone_and_in_a_batch_agree(self, tiny_lms, kind):
        alone = TextEncoder(tiny_lms[kind]).encode([PROMPTS[0]])
        among = TextEncoder(tiny_lms[kind]).encode([*PROMPTS[1:], PROMPTS[0]])
        length = alone.mask.shape[1]
        assert among.mask[-1].sum() == length
        assert_close(among.embeds[-1, :length], alone.embeds[0], atol=1e-5, rtol=0)

    def test_padding_is_masked_and_zero(self, tiny_text):
        context = tiny_text.encode(PROMPTS)
        assert context.mask.dtype == torch.bool
        assert context.embeds[~context.mask].abs().sum() == 0
        assert (context.embeds[context.mask].abs().sum(-1) > 0).all()

    def test_more_padding_leaves_the_embeddings(self, tiny_lms):
        """Pitfall 14, the LM's side: what the LM sees beyond a prompt's end changes nothing."""
        short = TextEncoder(tiny_lms["bert"], batch_size=1).encode([PROMPTS[0], "a " * 40])
        padded = TextEncoder(tiny_lms["bert"], batch_size=2).encode([PROMPTS[0], "a " * 40])
        assert_close(short.embeds, padded.embeds, atol=1e-5, rtol=0)

    def test_order_of_the_prompts_is_kept(self, tiny_lm):
        encoder = TextEncoder(tiny_lm, batch_size=2)
        prompts = ["a red cube and a blue cube", "a", "a red cube", "", "a"]
        context = encoder.encode(prompts)
        for i, prompt in enumerate(prompts):
            assert context.embeds[i][context.mask[i]].equal(encoder.encode([prompt]).embeds[0])

    def test_empty_prompt_has_special_tokens_only(self, tiny_lms):
        assert TextEncoder(tiny_lms["t5"]).encode([""]).mask.tolist() == [[True]]
        assert TextEncoder(tiny_lms["bert"]).encode([""]).mask.tolist() == [[True, True]]

    def test_empty_prompt_without_special_tokens_is_one_token(self, tmp_path, tiny_lms):
        folder = Path(shutil.copytree(tiny_lms["bert"], tmp_path / "plain"))
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        context = TextEncoder(folder).encode(["", "a cube"])
        assert context.mask.tolist() == [[True, False], [True, True]]

    def test_dtype(self, tiny_lm):
        assert TextEncoder(tiny_lm, dtype=torch.bfloat16).encode(["a"]).embeds.dtype == torch.bfloat16
        assert TextEncoder(tiny_lm).encode(["a"]).embeds.dtype == torch.float32

    def test_to(self, tiny_lm):
        encoder = TextEncoder(tiny_lm, device="meta")
        assert encoder.to("cpu") is encoder
        before = encoder.encode(["a cube"])
        assert before.embeds.device.type == "cpu"
        assert encoder.to("cpu")._cache, "it stays where it was"
        encoder.to("meta")
        assert not encoder._cache
        assert next(encoder._lm.parameters()).device.type == "meta", "it loads again where it is needed"
        assert encoder.to("cpu").encode(["a cube"]).embeds.equal(before.embeds)

    def test_bf16_by_default_on_gpus_only(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        encoder = TextEncoder("never loaded", device="cuda")
        assert encoder.dtype == torch.bfloat16
        assert encoder.to("cpu").dtype == torch.float32
        assert TextEncoder("never loaded", device="cuda", dtype=torch.float32).dtype == torch.float32
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        assert TextEncoder("never loaded", device="cuda").dtype == torch.float32

    @pytest.mark.parametrize("kind", KINDS)
    def test_bf16_is_near_float32(self, tiny_lms, kind):
        exact = TextEncoder(tiny_lms[kind]).encode(PROMPTS)
        rounded = TextEncoder(tiny_lms[kind], dtype=torch.bfloat16).encode(PROMPTS)
        assert rounded.embeds.dtype == torch.bfloat16
        assert rounded.mask.equal(exact.mask)
        off = (rounded.embeds.float() - exact.embeds).norm() / exact.embeds.norm()
        assert 0 < off < 0.03, f"bf16 has 8 bits, {off}"

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan_is_refused(self, tmp_path, tiny_lms, kind, bad):
        from safetensors.torch import load_file, save_file

        folder = Path(shutil.copytree(tiny_lms[kind], tmp_path / "lm"))
        weights = load_file(folder / "model.safetensors")
        for name, weight in weights.items():
            if "final_layer_norm" in name or "LayerNorm" in name or "layer_norm" in name:
                weight[0] = bad
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(
                ValueError, match=f"in {dtype} gives NaN or infinite embeddings; give text_dtype float32"
            ):
                TextEncoder(folder, dtype=dtype).encode(["a red cube"])

    def test_release(self, tiny_lm):
        encoder = TextEncoder(tiny_lm)
        before = encoder.encode(["a cube"]).embeds
        encoder.release()
        assert encoder.encode(["a cube"]).embeds.equal(before)
        assert "_lm" not in vars(encoder), "a known text needs no language model"
        assert encoder.encode(["a ball"]).embeds.shape == before.shape
        assert "_lm" in vars(encoder), "a new one loads it again"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_cuda_agrees_with_cpu(self, tiny_lm):
        cpu, cuda = TextEncoder(tiny_lm).encode(PROMPTS), TextEncoder(tiny_lm, device="cuda").encode(PROMPTS)
        assert cuda.embeds.is_cuda
        assert cuda.mask.is_cuda
        assert_close(cuda.embeds.cpu(), cpu.embeds, atol=1e-4, rtol=1e-3)


class TestFrozen:
    """Pitfall 18."""

    def test_eval_and_no_gradients(self, tiny_lms):
        encoder = TextEncoder(tiny_lms["bert"])
        context = encoder.encode(PROMPTS)
        assert not any(module.training for module in encoder._lm.modules())
        assert not any(p.requires_grad for p in encoder._lm.parameters())
        assert not context.embeds.requires_grad
        again = TextEncoder(tiny_lms["bert"]).encode(PROMPTS)
        assert context.embeds.equal(again.embeds)  # dropout is off

    def test_a_parent_cannot_reach_the_lm(self, tiny_lms):
        class Parent(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.text = TextEncoder(tiny_lms["bert"])

        parent = Parent()
        parent.text.encode(["a cube"])
        parent.train()
        assert not parent.text._lm.training
        assert not list(parent.parameters())
        assert not parent.state_dict()

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    def test_results_are_constants_for_autograd(self, tiny_lm, mode):
        """Even when they were made, and the LM was loaded, under inference_mode."""
        encoder = TextEncoder(tiny_lm)
        with mode():
            encoder.encode(["a red cube"])
        embeds = encoder.encode(["a red cube", "a blue cube"]).embeds
        weight = torch.ones(16, requires_grad=True)
        (embeds * weight).sum().backward()
        assert weight.grad.abs().sum() > 0

    def test_autocast_of_a_trainer_is_kept_out(self, tiny_lm):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = TextEncoder(tiny_lm).encode(["a red cube"])
        assert inside.embeds.equal(TextEncoder(tiny_lm).encode(["a red cube"]).embeds)


class TestCache:
    def test_each_different_text_is_encoded_once(self, tiny_lm, monkeypatch):
        encoder = TextEncoder(tiny_lm)
        calls = count_calls(encoder, monkeypatch)
        first = encoder.encode(["a cube", "a ball", "a cube"])
        assert calls == [2]
        assert first.embeds[0].equal(first.embeds[2])
        encoder.encode(["a ball", "a cube"])
        assert calls == [2]
        encoder.encode(["a ball", "a sphere"])
        assert calls == [2, 1]

    def test_bounded_and_the_oldest_goes_first(self, tiny_lm):
        encoder = TextEncoder(tiny_lm, cache_size=2 * 3 * 16 * 4)  # two texts of three tokens in float32
        encoder.encode(["a cube"])
        encoder.encode(["a ball"])
        encoder.encode(["a cube", "a sphere"])
        assert list(encoder._cache) == ["a ball", "a sphere"]

    def test_more_prompts_than_the_cache_holds(self, tiny_lm):
        small, large = TextEncoder(tiny_lm, cache_size=0), TextEncoder(tiny_lm)
        assert small.encode(PROMPTS).embeds.equal(large.encode(PROMPTS).embeds)
        assert small._cache == {}

    def test_rows_do_not_hold_their_batch(self, tiny_lm):
        encoder = TextEncoder(tiny_lm)
        encoder.encode(PROMPTS)
        for row in encoder._cache.values():
            assert row.untyped_storage().nbytes() == row.numel() * row.element_size()

    def test_what_a_user_does_to_a_context_stays_there(self, tiny_lm):
        encoder = TextEncoder(tiny_lm)
        before = encoder.encode(["a cube"]).embeds.clone()
        encoder.encode(["a cube"]).embeds.zero_()
        assert encoder.encode(["a cube"]).embeds.equal(before)

    def test_threads_share_an_encoder(self, tiny_lm):
        """An app answers several people at once."""
        encoder = TextEncoder(tiny_lm, cache_size=200)
        encoder.encode(["a"])
        expected = encoder.encode(PROMPTS).embeds
        with ThreadPoolExecutor(4) as pool:
            for context in pool.map(encoder.encode, [PROMPTS] * 40):
                assert_close(context.embeds, expected, atol=1e-5, rtol=0)


class TestTruncation:
    def test_warns_once_a_text_and_names_it(self, tiny_lm):
        encoder = TextEncoder(tiny_lm, max_tokens=8)
        long = "a red cube " * 5
        with pytest.warns(UserWarning, match="1 of 2 texts are cut to 8 tokens: 'a red cube") as caught:
            assert encoder.encode([long, "a"]).mask.sum(1).tolist() == [8, 2]
        assert caught[0].filename == __file__  # the warning points at the caller
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encoder.encode([long])
        with pytest.warns(UserWarning, match="1 of 1 texts are cut to 8"):
            encoder.encode([long + "a"])

    def test_forgotten_by_the_cache_it_is_still_shown_once(self, tiny_lm):
        encoder = TextEncoder(tiny_lm, max_tokens=4, cache_size=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                encoder.encode(["a red cube and a ball"])
        assert len(caught) == 1

    def test_end_token_survives(self, tiny_lm):
        encoder = TextEncoder(tiny_lm, max_tokens=4)
        assert (
            encoder._tokenizer("a red cube and a ball", truncation=True, max_length=encoder.limit)["input_ids"][-1] == 1
        )

    @pytest.mark.parametrize(("kind", "limit"), [("bert", 64), ("clip", 77)])
    def test_the_lms_own_limit_holds(self, tiny_lms, kind, limit):
        with pytest.warns(UserWarning, match=f"to {limit} tokens"):
            assert TextEncoder(tiny_lms[kind]).encode(["a " * 100]).mask.shape == (1, limit)

    def test_exactly_the_limit_is_silent(self, tiny_lm):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert TextEncoder(tiny_lm, max_tokens=4).encode(["a red cube"]).mask.shape == (1, 4)

    def test_many_long_texts_are_one_line_with_their_number(self, tiny_lm):
        encoder = TextEncoder(tiny_lm, max_tokens=4)
        with pytest.warns(UserWarning, match="30 of 40 texts are cut to 4 tokens: 'a red cube and a ball 0'") as caught:
            encoder.encode([f"a red cube and a ball {i}" for i in range(30)] + [f"{i}" for i in range(10)])
        assert len(caught) == 1


class TestUnknownTokens:
    CHINESE = ("一只红色的猫坐在草地上", "蓝天白云下的山")

    def test_texts_that_become_the_same_are_counted(self, tiny_lm):
        encoder = TextEncoder(tiny_lm)
        match = r"does not know \d+% of the tokens in 2 of 3 texts, such as '一只.*'; 1 become the same as another"
        with pytest.warns(UserWarning, match=match) as caught:
            context = encoder.encode(["a red cube", *self.CHINESE])
        assert len(caught) == 1
        assert context.embeds[1].equal(context.embeds[2]), "two sentences, one embedding: so a warning is due"

    def test_known_texts_are_silent(self, tiny_lms):
        for name in tiny_lms.values():
            assert TextEncoder(name).remarks(["a red cube", "", "two small spheres"]) == []

    @packaged
    def test_the_default_model(self):
        encoder = TextEncoder()
        assert encoder.remarks(["a red cube", "un café près de l'été"]) == []
        (remark,) = encoder.remarks(["a red cube", "\U0001f431\U0001f680", "\U0001f9ca", "빨간 고양이"])
        assert "does not know" in remark, remark


class TestRefusals:
    def test_pitfall_21_a_pickled_language_model_is_refused(self, tiny_lm, tmp_path):
        from safetensors.torch import load_file

        folder = Path(shutil.copytree(tiny_lm, tmp_path / "lm"))
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        with pytest.raises(OSError, match=r"no model\.safetensors; if you trust it, convert it: T5EncoderModel"):
            TextEncoder(folder).encode(["a red cube"])

    @pytest.mark.parametrize(
        ("prompts", "error", "match"),
        [
            ("a red cube", TypeError, r"the str 'a red cube'; give a list"),
            (7, ValueError, "prompts is 7"),
            ([], ValueError, "got no prompts; give at least one"),
        ],
    )
    def test_prompts(self, prompts, error, match):
        with pytest.raises(error, match=match):
            TextEncoder("never loaded").encode(prompts)

    def test_any_iterable_of_str_will_do(self, tiny_text):
        assert tiny_text.encode(("a", "a cube")).embeds.equal(tiny_text.encode(iter(["a", "a cube"])).embeds)

    def test_settings(self):
        with pytest.raises(ValueError, match="max_tokens is 2; give at least 3"):
            TextEncoder(max_tokens=2)
        for name, value in (("max_tokens", "x"), ("max_tokens", True), ("batch_size", 0), ("cache_size", -1)):
            with pytest.raises(ValueError, match=f"{name} is "):
                TextEncoder(**{name: value})

    def test_unknown_name(self):
        encoder = TextEncoder("nobody/no-such-model")
        with pytest.raises(OSError, match=r"no-such-model.*minimuse\[offline\]"):
            encoder.encode(["a"])

    @pytest.mark.parametrize("kind", KINDS)
    def test_folder_without_a_tokenizer(self, tmp_path, tiny_lms, kind):
        """transformers 5 would make an empty one for T5 and BERT, and every word would be <unk>."""
        for name in ("config.json", "model.safetensors"):
            shutil.copy(Path(tiny_lms[kind], name), tmp_path)
        with pytest.raises(OSError, match="no tokenizer"):
            TextEncoder(tmp_path).encode(["a"])


class TestMiniLM:
    @pytest.fixture
    def fake_package(self, tmp_path, monkeypatch, tiny_lms):
        """A package of that name, with another LM in it."""
        root = tmp_path / text.MINILM_PACKAGE
        shutil.copytree(tiny_lms["bert"], root / "model")
        (root / "__init__.py").write_text("raise AssertionError('the package must be found, not imported')\n")
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.startswith(text.MINILM_PACKAGE)]:
            monkeypatch.delitem(sys.modules, name)
        return root

    @pytest.fixture
    def no_package(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    @packaged
    @pytest.mark.parametrize("name", [MINILM, f"sentence-transformers/{MINILM}"])
    def test_packaged_matches_transformers(self, name, no_network):
        encoder = TextEncoder(name)
        context = encoder.encode(PROMPTS)
        assert context.embeds.shape[2] == 384
        assert context.mask.sum(1).tolist() == [5, 2, 13, 6]
        for row, mask, prompt in zip(context.embeds, context.mask, PROMPTS, strict=True):
            assert_close(row[mask], reference(encoder.source, "bert", prompt), atol=1e-5, rtol=1e-4)

    @pytest.mark.slow
    @packaged
    def test_package_is_not_imported(self):
        code = (
            "import sys; from minimuse import TextEncoder; TextEncoder().encode(['a cube']); "
            "sys.exit('sentence_transformers' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_the_package_is_found_not_imported(self, fake_package, no_network):
        assert TextEncoder().encode(["a cube"]).embeds.shape == (1, 4, 16), "the LM of the package's folder"

    def test_neither_package_nor_network_names_the_extra(self, no_package):
        with pytest.raises(OSError, match=r"pip install 'minimuse\[offline\]'"):
            TextEncoder().encode(["a cube"])

    def test_without_the_package_the_hub_is_asked(self, no_package):
        assert TextEncoder(MINILM).source == f"sentence-transformers/{MINILM}"

    def test_hub_cache_is_used_without_the_package(self, no_package, tiny_lms, tmp_path, monkeypatch):
        """A folder laid out as the hub's cache: models--OWNER--NAME / snapshots / COMMIT."""
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE) / f"models--sentence-transformers--{MINILM}"
        shutil.copytree(tiny_lms["bert"], cache / "snapshots" / "0" / "")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0")
        try:
            assert TextEncoder().encode(["a cube"]).embeds.shape == (1, 4, 16)
        finally:
            shutil.rmtree(cache)


class TestCheapToImport:
    """Pitfall 20: nothing is loaded, and nothing asked for, before it is needed."""

    @pytest.mark.parametrize("name", [MINILM, "google/t5-v1_1-xxl", "no/where"])
    def test_construction_touches_no_network(self, name, no_network):
        encoder = TextEncoder(name)
        assert encoder.name == name
        assert not {"_config", "_tokenizer", "_lm"} & set(vars(encoder))

    def test_import_brings_torch_alone(self):
        code = "import sys, minimuse.text; sys.exit('transformers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_loading_leaves_the_users_logging_alone(self, tiny_lm, capfd):
        from transformers.utils import logging

        before = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            TextEncoder(tiny_lm).encode(["a cube"])
            assert logging.get_verbosity() == logging.CRITICAL
            assert logging.is_progress_bar_enabled()
        finally:
            logging.set_verbosity(before)
        assert capfd.readouterr().err == ""


def test_weights_that_lack_some(tmp_path, tiny_lms):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_lms["bert"], tmp_path / "lm"))
    weights = load_file(folder / "model.safetensors")
    left = {name: weight for name, weight in weights.items() if "layer.1." not in name}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 16 weights, such as 'encoder\.layer\.1"):
        TextEncoder(folder).encode(["a"])
