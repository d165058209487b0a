"""CLIP scores: how well a picture fits its prompt (Muse 3.2). Images (B, 3, H, W), B prompts -> scores (B,).

    SceneClip    a small CLIP for scenes, shipped with the package
        image (B, 3, 64, 64) --convolutions, attention--> 64 cells (B, 64, d) -----------------+--> score in [-1, 1]
        prompt --frozen language model, attention--> one vector per text token (B, L, d) ------+
    ClipScorer   any CLIP of `transformers`

The score of SceneClip is the largest cosine of each text token with a cell, averaged over tokens (FILIP, arXiv
2111.07783). SceneClip only measures: it shares no weights or data seeds with the detector and the losses, and was
trained without scenes of split "train" and without generated pictures.
B pictures, T texts, L text tokens, d = 48. Not here: training (benchmarks/train_clip.py).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse import checkpoint
from minimuse.data_images import to_pil
from minimuse.eval_detector import SIZE, Images, load_network, to_network_input
from minimuse.text import Context, TextEncoder
from minimuse.vqgan import Encoder, VQGANConfig

CLIP_FORMAT = "minimuse-scorer-1"
WIDTH = 48  # d
_SIZES = {"code_dim": WIDTH, "width": 16, "multipliers": (1, 2, 3, 3), "blocks": (0, 0, 1, 1)}
_UNUSED = {"codebook_size": 1, "decoder_width": 16, "decoder_blocks": (0, 0, 0, 0)}
TOWER = VQGANConfig(image_size=SIZE, **_SIZES, **_UNUSED)


class SceneClipNetwork(nn.Module):
    """The image tower and the text tower; `text_width` is the language model's."""

    def __init__(self, text_width: int = 384):
        super().__init__()
        mixer = partial(nn.TransformerEncoderLayer, WIDTH, 4, 2 * WIDTH, 0.0, F.gelu, norm_first=True)
        self.see = Encoder(TOWER)
        self.mix_cells = mixer(batch_first=True)
        self.mix_words = mixer(batch_first=True)
        self.place = nn.Parameter(torch.randn(TOWER.grid**2, WIDTH) * 0.1)
        self.hear = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, WIDTH))
        self.scale = nn.Parameter(torch.tensor(3.0))  # log of the softmax's scale in training

    def cells(self, images: Tensor) -> Tensor:
        """images (B, 3, 64, 64) -> unit vectors (B, 64, d)."""
        cells = self.see(images).flatten(2).transpose(1, 2)
        return F.normalize(self.mix_cells(cells + self.place).float(), dim=-1)

    def words(self, text: Context) -> Tensor:
        """T texts -> unit vectors (T, L, d)."""
        words = self.mix_words(self.hear(text.embeds), src_key_padding_mask=~text.mask)
        return F.normalize(words.float(), dim=-1)

    def forward(self, images: Tensor, text: Context) -> Tensor:
        """B images, T texts -> (B, T): the score of every image with every text."""
        best = torch.einsum("bcd,tld->btlc", self.cells(images), self.words(text)).amax(-1)
        return (best * text.mask).sum(-1) / text.mask.sum(-1)


class SceneClip:
    """The trained network and its language model."""

    def __init__(self, net: SceneClipNetwork, encoder: TextEncoder | None = None):
        self.net = net.eval().requires_grad_(False)
        self.encoder = encoder or TextEncoder()

    @classmethod
    def from_pretrained(cls, folder: str | Path = checkpoint.SHIPPED / "clip") -> "SceneClip":
        """The shipped SceneClip, or a folder that benchmarks/train_clip.py wrote."""
        net = SceneClipNetwork()
        load_network(net, folder, CLIP_FORMAT, "train_clip.py")
        return cls(net)

    @torch.inference_mode()
    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts; give the prompt of each picture")
        texts = (self.encoder.encode(prompts[i : i + 64]) for i in range(0, len(prompts), 64))
        pairs = zip(to_network_input(images).split(64), texts, strict=True)
        return torch.cat([self.net(*pair).diagonal() for pair in pairs])


class ClipScorer:
    """Cosines of the image and text embeddings of a CLIP, a folder or hub id. Each CLIP has its own scale of scores."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoProcessor, CLIPModel

        self.processor = AutoProcessor.from_pretrained(name)
        model, info = CLIPModel.from_pretrained(name, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{name!r} is not a complete CLIP: it lacks {missing[0]!r} and others")
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        both = {"text": list(prompts), "images": to_pil(images)}
        inputs = self.processor(**both, return_tensors="pt", padding=True, truncation=True)
        out = self.model(**inputs.to(self.model.device))
        return F.cosine_similarity(out.image_embeds, out.text_embeds)
