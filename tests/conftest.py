"""What all tests share: fixed seeds, no network, and tiny random language models on disk.

Fixtures for everyone:
    tiny_lm       folder of a tiny T5 (both halves, D_lm = 16) with its tokenizer: TextEncoder(tiny_lm)
    tiny_lms      {"t5" | "bert" | "albert" | "clip": folder}, all of D_lm = 16
    tiny_text     a TextEncoder over tiny_lm, shared by the session
    tiny_clip     folder of a tiny random CLIP, both towers: ClipScorer(tiny_clip)
    tiny_muse     a whole Muse over tiny_lm with random weights, shared by the session
    tiny_run      the folder of a finished run of it, two steps a stage, shared by the session
    no_network    any attempt to make a socket or to resolve a name fails the test at once
"""

import os
import socket
import struct
import tempfile
import zlib
from pathlib import Path

# These are set before torch, transformers and matplotlib are imported, which read them once. Subprocesses inherit them.
# The hub cache is empty, so a developer's own cache cannot change a result. One thread, as tests run in two processes.
_HUB = tempfile.TemporaryDirectory(prefix="minimuse-hub-", ignore_cleanup_errors=True)
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_HOME": _HUB.name,
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
D_LM = 16
WORDS = """
a an the of in on and to left right front behind between with one two three small large big tiny shiny matte rubber
metal red green blue yellow purple cyan orange brown gray sphere spheres cube cubes cylinder cylinders ball box there
are is picture scene
""".split()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No connection leaves this machine, as on a laptop on a train. Those to itself (notebooks, apps) work."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def is_local(host):
        return host is None or str(host) in ("", "localhost", "::1", "0.0.0.0") or str(host).startswith("127.")

    def guarded_connect(self, address):
        if isinstance(address, tuple) and not is_local(address[0]):
            raise ConnectionError(f"tests run without a network; something wanted {address}")
        return connect(self, address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        if not is_local(host.decode() if isinstance(host, bytes) else host):
            raise socket.gaierror(f"tests run without a network; something wanted {host}")
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


@pytest.fixture
def no_network(monkeypatch):
    """Not even a socket: for what must not so much as try (pitfall 20)."""

    def refuse(*args, **kwargs):
        pytest.fail(f"the network was touched: {args}")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def parameter_counts(config) -> dict[str, int]:
    """The number of parameters of each network of a configuration, without their memory."""
    from minimuse.muse import build

    with torch.device("meta"):
        return {name: sum(p.numel() for p in part.parameters()) for name, part in build(config).items()}


def giant_png(side: int = 20_000) -> bytes:
    """A valid PNG of side x side black and white pixels, in some kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pack = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    rows = b"".join(pack.compress(row) for _ in range(side)) + pack.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def save_tiny_lm(folder: Path, kind: str) -> Path:
    """A random LM of D_lm = 16 with a tokenizer of WORDS; other words fall apart into letters."""
    import transformers as tf
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:'!?-()"
    tokens = ["<pad>", "</s>", "<unk>", "<s>", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    single = "$A </s>" if kind == "t5" else "<s> $A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    limit = 77 if kind == "clip" else 64
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=limit, **names).save_pretrained(folder)

    size = {"vocab_size": len(vocab), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
    blocks = {"hidden_size": D_LM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    with torch.random.fork_rng():
        if kind == "t5":
            dims = {"d_model": D_LM, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
            lm = tf.T5Model(tf.T5Config(**size, **dims, decoder_start_token_id=0))
        elif kind == "bert":
            lm = tf.BertModel(tf.BertConfig(**size, **blocks, max_position_embeddings=64))
        elif kind == "albert":
            lm = tf.AlbertModel(tf.AlbertConfig(**size, **blocks, embedding_size=8, max_position_embeddings=64))
        else:
            lm = tf.CLIPTextModel(tf.CLIPTextConfig(**size, **blocks, max_position_embeddings=77))
        lm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lms(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("lms")
    return {kind: str(save_tiny_lm(root / kind, kind)) for kind in ("t5", "bert", "albert", "clip")}


@pytest.fixture(scope="session")
def tiny_lm(tiny_lms) -> str:
    return tiny_lms["t5"]


@pytest.fixture(scope="session")
def tiny_text(tiny_lm):
    from minimuse.text import TextEncoder

    return TextEncoder(tiny_lm)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> str:
    """Folder of a tiny random CLIP of `transformers`, both towers and the processor."""
    import transformers as tf

    folder = tmp_path_factory.mktemp("clip")
    save_tiny_lm(folder, "clip")
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    blocks = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**blocks, "vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
    config = tf.CLIPConfig(
        text_config=text, vision_config={**blocks, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(0)
    tf.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tf.CLIPProcessor(tf.CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_muse(tiny_lm):
    """A whole Muse with random weights and nano's grids. Shared: change no weights, move it nowhere."""
    from dataclasses import replace

    from minimuse.config import StageConfig, preset
    from minimuse.muse import Muse, build
    from minimuse.text import TextEncoder

    config = preset("nano")

    def tokenizer(c):
        ones = (1,) * len(c.multipliers)
        small = {"width": 16, "multipliers": ones, "blocks": ones, "decoder_width": 16, "decoder_blocks": ones}
        return replace(c, codebook_size=16, code_dim=4, **small)

    small = {"codebook_size": 16, "text_width": D_LM, "width": 32, "heads": 4, "mlp_width": 64}
    high = tokenizer(config.high_tokenizer)
    stage = StageConfig(
        steps=2,
        batch=4,
        learning_rate=1e-3,
        warmup=1,
        weight_decay=0.0,
        perceptual_weight=0.0,
        adversarial_weight=0.0,
    )
    config = replace(
        config,
        name="tiny",
        text_encoder=tiny_lm,
        low_tokenizer=tokenizer(config.low_tokenizer),
        high_tokenizer=high,
        base=replace(config.base, layers=2, **small),
        superres=replace(config.superres, layers=1, low_layers=1, draft=True, low_codebook_size=16, **small),
        finetuned_width=32,
        finetuned_blocks=high.decoder_blocks,
        scenes=8,
        captions=1,
        stages=dict.fromkeys(config.stages, stage),
    )
    torch.manual_seed(0)
    encoder = TextEncoder(tiny_lm, max_tokens=config.text_tokens)
    parts = build(config).eval().requires_grad_(False)
    return Muse(config, parts, encoder, words=WORDS, examples=["a red cube", "a blue ball", "two small green boxes"])


@pytest.fixture(scope="session")
def tiny_run(tiny_muse, tmp_path_factory):
    """The folder of a finished run of two steps a stage, as `minimuse train` leaves it. Shared: change nothing."""
    from dataclasses import replace

    from minimuse import train_state as runs
    from minimuse.config import to_dict
    from minimuse.data_sources import open_source
    from minimuse.train import train_muse
    from minimuse.train_engine import Engine

    config, folder = tiny_muse.config, tmp_path_factory.mktemp("runs") / "tiny"
    config = replace(config, stages={name: replace(stage, eval_every=2) for name, stage in config.stages.items()})
    data = runs.data_record("scenes", open_source("scenes", config))
    runs.open_run(folder, {"config": to_dict(config), "seed": 0, "data": data}, resume=False)
    *_, last = train_muse(config, engine=Engine(device="cpu", bf16=False, folder=folder))
    last.model.save_pretrained(folder, overwrite=True)
    return folder
