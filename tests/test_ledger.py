"""The paper ledger: what Muse says -> the function that does it -> the tests that hold it there.

The table in notebooks/LEDGER.md is made from LEDGER; after a change here:  python tests/test_ledger.py --write
"""

import ast
import functools
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that --write needs no installation
PAGE = ROOT / "notebooks" / "LEDGER.md"
BEGIN, END = "<!-- ledger -->\n", "<!-- /ledger -->"

# (section, what the paper says, function, tests as "file::name" with spaces between)
LEDGER: list[tuple[str, str, str, str]] = [
    (
        "2.1",
        "A pre-trained language model, frozen, turns a prompt into a sequence of embeddings, one for each text token",
        "text.TextEncoder.encode",
        "test_text.py::test_eval_and_no_gradients test_text.py::test_a_parent_cannot_reach_the_lm "
        "test_text.py::test_padding_is_masked_and_zero",
    ),
    (
        "2.1",
        "T5-XXL, its encoder half; ALBERT, BERT/MiniLM and CLIP text fit the same socket",
        "text.TextEncoder",
        "test_text.py::test_t5_keeps_the_encoder_half_only test_text.py::test_same_numbers "
        "test_text.py::test_packaged_matches_transformers",
    ),
    (
        "2.2",
        "Image -> a grid of tokens, each the nearest code of a learned codebook: argmin_k ‖z - e_k‖²",
        "vqgan.VectorQuantizer.nearest",
        "test_vqgan.py::test_nearest_is_the_brute_force_nearest test_vqgan.py::test_straight_through_gradient",
    ),
    (
        "2.2",
        "Encoder and decoder all-convolutional, so any size works",
        "vqgan.VQGAN",
        "test_vqgan.py::test_it_is_all_convolutional test_vqgan.py::test_any_multiple_of_f_works",
    ),
    (
        "2.2",
        "Low-res tokenizer 256 px, f=16: 16x16 = 256 tokens; high-res 512 px, f=8: 64x64 = 4096 tokens",
        "vqgan.VQGANConfig",
        "test_config.py::test_sizes_of_the_presets",
    ),
    (
        "2.2",
        "Codebook of 8192; a larger one did not help; codebook usage is logged",
        "train_log.codebook_usage",
        "test_config.py::test_the_papers_numbers test_vqgan.py::test_pitfall_19_dead_codes_restart "
        "test_train.py::test_pitfall_19_usage_and_perplexity_are_reported",
    ),
    (
        "2.2",
        "Trained as VQGAN: pixels, 0.05 perceptual, 0.1 adversarial, codebook and commitment losses",
        "vqgan_loss.VQGANLoss",
        "test_vqgan_loss.py::test_the_papers_weights_are_the_default "
        "test_vqgan_loss.py::test_balanced_gradients_at_the_last_layer test_train.py::test_a_tokenizer_learns",
    ),
    (
        "2.3",
        "Self-attention over the image tokens, cross-attention to all text tokens, MLP -> logits over the codebook",
        "transformer.Transformer",
        "test_transformer.py::test_logits_depend_on_tokens_places_text_and_its_order "
        "test_transformer.py::test_pitfall_14_padding_of_the_text_does_not_matter",
    ),
    (
        "2.3",
        "[MASK] stands where a token is to be predicted",
        "transformer.Transformer",
        "test_transformer.py::test_mask_id_is_one_past_the_codebook "
        "test_transformer.py::test_pitfall_07_masked_tokens_do_not_leak",
    ),
    (
        "2.3",
        "The marginal distribution of each masked token: cross-entropy where masked, and nowhere else",
        "masking.masked_cross_entropy",
        "test_masking.py::test_masked_cross_entropy_by_hand "
        "test_masking.py::test_pitfall_06_unmasked_targets_do_not_count",
    ),
    (
        "2.3",
        "Masked training of the base model, conditioned on unmasked tokens and text",
        "train.train_transformer",
        "test_train.py::test_a_transformer_learns_what_the_text_tells "
        "test_train.py::test_pitfall_07_training_hides_what_it_asks_for",
    ),
    (
        "2.4",
        "Super-resolution cross-attends to the text and to the low-res tokens, encoded and concatenated",
        "transformer.SuperRes.memory",
        "test_transformer.py::test_pitfall_01_super_resolution_reads_its_condition "
        "test_transformer.py::test_pitfall_02_low_res_tokens_have_positions "
        "test_muse.py::test_superres_reads_the_low_tokens",
    ),
    (
        "2.4",
        "Multi-axis self-attention over the high-res tokens: half of the heads in blocks, half across them",
        "transformer.multi_axis_attention",
        "test_transformer.py::test_multi_axis_attention_is_full_attention_under_two_masks "
        "test_transformer.py::test_two_layers_of_multi_axis_attention_reach_everywhere",
    ),
    (
        "2.4",
        "Masked training on the unmasked high-res tokens, after the base model",
        "train.train_transformer",
        "test_train.py::test_super_resolution_learns_what_the_low_tokens_tell "
        "test_train.py::test_low_tokens_belong_to_their_image",
    ),
    (
        "2.5",
        "A decoder with more layers and channels; encoder and codebook stay",
        "vqgan.VQGAN.grow_decoder",
        "test_vqgan.py::test_a_grown_decoder_begins_as_the_same_function "
        "test_config.py::test_the_fine_tuned_tokenizer_differs_in_its_decoder_alone",
    ),
    (
        "2.5",
        "It alone is fine-tuned, encoder and codebook frozen bit for bit: the token language does not change",
        "train.train_tokenizer",
        "test_vqgan.py::test_fine_tuning_keeps_encoder_and_codebook_bit_for_bit "
        "test_train.py::test_fine_tuning_the_decoder_alone",
    ),
    (
        "2.6",
        "One mask rate for each example, cosine: r = cos(πu / 2), p(r) = (2/π)(1 - r²)^(-1/2), E[r] = 0.64",
        "masking.sample_mask_rate",
        "test_masking.py::test_pitfall_04_mask_rate_mean_and_tail "
        "test_masking.py::test_mask_rates_have_the_density_of_the_schedule "
        "test_masking.py::test_pitfall_05_rates_differ_within_a_batch",
    ),
    (
        "2.6",
        "Random positions are masked at that rate",
        "masking.random_mask",
        "test_masking.py::test_random_mask_covers_exactly_ceil_of_rate_times_n "
        "test_train.py::test_pitfall_04_05_masks_of_a_training_step",
    ),
    (
        "2.7",
        "Training: the text is removed from 10% of the examples",
        "cfg.drop_text",
        "test_cfg.py::test_pitfall_03_the_fraction_of_dropped_texts "
        "test_train.py::test_pitfall_03_a_tenth_of_the_texts_is_dropped",
    ),
    (
        "2.7",
        "Sampling: l_g = (1 + t) l_c - t l_u",
        "cfg.guide",
        "test_cfg.py::test_guide_is_muses_formula "
        "test_cfg.py::test_pitfall_12_zero_guidance_is_the_conditional_and_scales_convert",
    ),
    (
        "2.7",
        "t rises linearly through the steps: diversity at first, fidelity at the end",
        "cfg.rising",
        "test_cfg.py::test_rising_is_linear_from_start_to_t test_muse.py::test_the_trace_of_a_decode",
    ),
    (
        "2.7",
        "A negative prompt takes the place of l_u",
        "muse.Muse.contexts",
        "test_muse.py::test_pitfall_13_a_negative_prompt_of_the_same_text_cancels_guidance "
        "test_muse.py::test_pitfall_13_negative_prompts_one_for_each_and_none",
    ),
    (
        "2.8",
        "Iterative parallel decoding: at each step the most confident predictions are fixed, and stay",
        "sampler.decode",
        "test_sampler.py::test_pitfall_08_revealed_tokens_never_change "
        "test_sampler.py::test_without_noise_the_most_confident_are_kept",
    ),
    (
        "2.8",
        "How many: the cosine schedule",
        "sampler.decode",
        "test_masking.py::test_pitfall_09_reveal_counts_match_maskgits_table "
        "test_sampler.py::test_pitfall_09_each_step_reveals_what_the_table_says",
    ),
    (
        "2.8",
        "24 steps for the base model's 256 tokens, 8 for super-resolution's 4096",
        "sampler.SamplingConfig",
        "test_config.py::test_the_papers_numbers test_muse.py::test_defaults_are_the_checkpoints",
    ),
    (
        "Fig. 3",
        "Text encoder -> base -> super-resolution -> decoder",
        "muse.Muse.decode",
        "test_muse.py::test_the_trace_of_a_decode test_muse.py::test_save_load_same_pixels",
    ),
    (
        "3.2",
        "Quality is FID, fit to the prompt CLIP score",
        "eval_metrics.frechet_interval",
        "test_eval_metrics.py::test_frechet_is_scipys test_eval_clip.py::test_clip_score_is_transformers_own_logit",
    ),
    (
        "Fig. 8",
        "FID against CLIP score over guidance and temperature: the Pareto front",
        "eval_run.evaluate",
        "test_eval_run.py::test_a_sweep_is_one_call_and_two_plots test_plots.py::test_pareto_front_by_hand "
        "test_plots.py::test_tradeoff_draws_points_intervals_and_front",
    ),
    (
        "3.3",
        "The region is masked in both token grids, wherever a token overlaps it",
        "editing.token_mask",
        "test_editing.py::test_pitfall_16_one_pixel_masks_its_token "
        "test_editing.py::test_pitfall_16_one_pixel_masks_the_tokens_that_hold_it",
    ),
    (
        "3.3.1",
        "Text-guided inpainting: the base model fills the low tokens, super-resolution the high ones",
        "editing.inpaint",
        "test_editing.py::test_inpaint_leaves_tokens_outside_as_they_are "
        "test_editing.py::test_inpaint_keeps_the_users_pixels test_editing.py::test_infill_leaves_the_others",
    ),
    (
        "3.3.1",
        "Outpainting: the region is new canvas",
        "editing.outpaint",
        "test_editing.py::test_outpaint_grows_by_the_padding_and_keeps_the_picture "
        "test_editing.py::test_windows_cover_the_canvas",
    ),
    (
        "3.3.2",
        "Zero-shot mask-free editing: a random 8% of the tokens masked and resampled, 100 times, guidance 4, top-k 3",
        "editing.resample",
        "test_editing.py::test_the_papers_mask_free_edit "
        "test_editing.py::test_each_iteration_masks_a_share_and_changes_no_other "
        "test_editing.py::test_edit_defaults_are_the_papers",
    ),
    (
        "3.3.2",
        "Then super-resolution under the editing prompt",
        "editing.edit",
        "test_editing.py::test_edit_changes_a_share_of_the_tokens_at_a_time "
        "test_editing.py::test_edit_superres_reads_the_edited_tokens",
    ),
    (
        "A.1",
        "3B base: 48 layers, width 2048, MLP 8192; the smaller pair: 632M and 268M",
        "transformer.TransformerConfig",
        "test_transformer.py::test_the_3b_preset_has_the_papers_numbers test_muse.py::test_the_papers_sizes",
    ),
    (
        "A.3",
        "Super-resolution: 16 layers over the low-res tokens, 32 layers of width 1024, MLP 4096",
        "transformer.TransformerConfig",
        "test_transformer.py::test_the_3b_preset_has_the_papers_numbers test_cli.py::test_info_of_all_presets",
    ),
]

# What the seed notes say, line by line: section -> a word of the row that holds it.
NOTES = {
    "2.1": ["language model", "ALBERT", "T5-XXL", "embeddings"],
    "2.2": ["codebook", "256 px, f=16", "16x16", "8192", "larger", "512 px, f=8", "64x64", "Trained as VQGAN"],
    "2.3": ["Masked training", "marginal distribution", "[MASK]", "Self-attention", "unmasked", "cross-attention"],
    "2.4": ["Masked training", "unmasked high-res", "low-res tokens", "text", "Multi-axis self-attention"],
    "2.5": ["encoder and codebook frozen", "fine-tuned", "more layers"],
    "2.6": ["cosine", "p(r) = (2/π)(1 - r²)^(-1/2)", "0.64"],
    "2.7": ["10%", "l_g = (1 + t) l_c - t l_u", "negative prompt", "t rises"],
    "2.8": ["24 steps", "8 for super-resolution"],
    "3.3.1": ["inpainting", "Outpainting"],
    "3.3.2": ["mask-free editing", "masked and resampled", "super-resolution"],
}


def resolve(dotted: str) -> list:
    """ "muse.Muse.decode" -> [the function, its class, its module]."""
    module, *names = dotted.split(".")
    found = [importlib.import_module(f"minimuse.{module}")]
    for name in names:
        found.append(getattr(found[-1], name))
    return found[::-1]


def cites(text: str, section: str) -> bool:
    """Does a docstring name the section: 2.6, and not 12.6, 2.61 or 2.6.1?"""
    pattern = section.replace("Fig. ", r"(?:Fig\.|[Ff]igure) ") if "Fig" in section else re.escape(section)
    return re.search(rf"(?<![\w.]){pattern}(?!\.?\d)", text) is not None or any(
        first[:-1] == section[:-1] and first[-1] < section[-1] <= last[-1]  # "A.1 to A.3" names A.2 too
        for first, last in re.findall(r"([A-Z]\.\d) to ([A-Z]\.\d)", text)
    )


@functools.cache
def names_in(file: str) -> frozenset[str]:
    """Names of the tests in tests/<file>; none where there is no such file."""
    path = ROOT / "tests" / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def table() -> str:
    """LEDGER -> the markdown of notebooks/LEDGER.md."""
    lines = ["| Paper | What it says | Code | Tests |", "|---|---|---|---|"]
    for section, says, dotted, tests in LEDGER:
        module, name = dotted.split(".", 1)
        files: dict[str, list[str]] = {}
        for test in tests.split():
            file, test_name = test.split("::")
            files.setdefault(file, []).append(f"`{test_name.removeprefix('test_')}`")
        held = "; ".join(f"[{file}](../tests/{file}) {', '.join(names)}" for file, names in files.items())
        lines.append(f"| {section} | {says} | [{module}.py](../minimuse/{module}.py) `{name}` | {held} |")
    return "\n".join(lines) + "\n"


# --- its own tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", LEDGER, ids=[f"{s} {f}" for s, _, f, _ in LEDGER])
def test_each_function_cites_its_section(row):
    section, _, dotted, _ = row
    documented = [inspect.getdoc(x) or "" for x in resolve(dotted) if not isinstance(x, property)]
    assert any(cites(doc, section) for doc in documented), (
        f"neither the docstring of {dotted} nor that of its class or module cites Muse {section}"
    )


@pytest.mark.parametrize("row", LEDGER, ids=[f"{s} {f}" for s, _, f, _ in LEDGER])
def test_each_named_test_exists(row):
    for test in row[3].split():
        file, name = test.split("::")
        assert name in names_in(file), f"tests/{file} holds no {name}; the ledger needs it for Muse {row[0]}"


def test_every_line_of_the_seed_notes_stands_in_it():
    for section, words in NOTES.items():
        said = " ".join(says for s, says, _, _ in LEDGER if s == section).lower()
        for word in words:
            assert word.lower() in said, f"Muse {section}: no row says {word!r}"
    sections = [s for s, *_ in LEDGER]
    assert len({tuple(row) for row in LEDGER}) == len(LEDGER), "a row stands twice"
    assert all(f"2.{i}" in sections for i in range(1, 9)), "a section of the model is missing"


def test_rows_fit_a_table():
    for row in LEDGER:
        assert not any("|" in cell or "\n" in cell for cell in row), f"no bars and no newlines in a table's cell: {row}"


def test_cites_by_hand():
    for text, section in [("Muse 2.6", "2.6"), ("(2.6, 2.7).", "2.6"), ("3.3.1", "3.3.1"), ("figure 3", "Fig. 3")]:
        assert cites(text, section), f"{text!r} cites {section}"
    assert cites("A.1 to A.3", "A.2"), "a range names what lies between"
    for text, section in [
        ("12.6", "2.6"),
        ("2.61", "2.6"),
        ("3.3.1", "3.3"),
        ("3.3", "3.3.1"),
        ("figure 30", "Fig. 3"),
    ]:
        assert not cites(text, section), f"{text!r} does not cite {section}"


def test_write_fills_the_space_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{BEGIN}old\n{END}\n# after é\n", encoding="utf-8")
    for _ in range(2):
        write(readme)
        assert readme.read_text(encoding="utf-8") == f"# before\n{BEGIN}{table()}{END}\n# after é\n", "and no more"


def test_the_page_holds_the_generated_table():
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    if BEGIN not in text or END not in text:
        pytest.skip("LEDGER.md has no markers")
    written = text.split(BEGIN)[1].split(END)[0]
    assert written == table(), "notebooks/LEDGER.md is not the generated one; run: python tests/test_ledger.py --write"


def write(readme: Path = PAGE) -> None:
    """Put the table between the markers of the page."""
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(before + BEGIN + table() + END + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_ledger.py --write")
    write()
