"""CLIP scores: how well a picture fits its prompt (Muse 3.2).

    SceneClip    a small CLIP for scenes, shipped with the package, so that a CLIP score needs no download
    ClipScorer   any CLIP of `transformers`

Both are functions images (B, 3, H, W), B prompts -> scores (B,). The CLIP score is
`mean_interval(in_batches(scorer, images, prompts), groups=prompts)`.

SceneClip:
    image (B, 3, 64, 64) --convolutions, attention--> 64 cells (B, 64, d) -----------------+--> score (B,) in [-1, 1]
    prompt --frozen language model, attention--> one vector per text token (B, L, d) ------+
The score is the largest cosine of each text token with a cell, averaged over tokens (FILIP, arXiv 2111.07783).
SceneClip only measures. It shares no weights, training run or data seed with the detector or a perceptual network. It
was trained without scenes of split "train" and without generated pictures.

B pictures, T texts, L text tokens, d = 48. Not here: training (benchmarks/train_clip.py).
"""

from collections.abc import Sequence
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
TOWER = VQGANConfig(  # only its encoder is used
    image_size=SIZE,
    codebook_size=1,
    code_dim=WIDTH,
    width=16,
    multipliers=(1, 2, 3, 3),
    blocks=(0, 0, 1, 1),
    decoder_width=16,
    decoder_blocks=(0, 0, 0, 0),
)


class SceneClipNetwork(nn.Module):
    """The image tower and the text tower; `text_width` is the language model's."""

    def __init__(self, text_width: int = 384):
        super().__init__()

        def mixing() -> nn.Module:
            return nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True)

        self.see = Encoder(TOWER)
        self.mix_cells = mixing()
        self.mix_words = mixing()
        self.place = nn.Parameter(torch.randn(TOWER.grid**2, WIDTH) * 0.1)
        self.hear = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, WIDTH))
        self.scale = nn.Parameter(torch.tensor(3.0))  # log of the softmax's scale in training

    def cells(self, images: Tensor) -> Tensor:
        """images (B, 3, 64, 64) -> unit vectors (B, 64, d)."""
        z = self.see(images).flatten(2).transpose(1, 2)
        return F.normalize(self.mix_cells(z + self.place).float(), dim=-1)

    def words(self, text: Context) -> Tensor:
        """T texts -> unit vectors (T, L, d)."""
        words = self.mix_words(self.hear(text.embeds), src_key_padding_mask=~text.mask)
        return F.normalize(words.float(), dim=-1)

    def forward(self, images: Tensor, text: Context) -> Tensor:
        """B images, T texts -> (B, T): the score of every image with every text."""
        best = torch.einsum("bcd,tld->btlc", self.cells(images), self.words(text)).amax(-1)
        return (best * text.mask).sum(-1) / text.mask.sum(-1)


class SceneClip:
    """The trained network and its language model: images, B prompts -> scores (B,).

    >>> SceneClip.from_pretrained()(images, ["a red cube"] * len(images))
    """

    def __init__(self, net: SceneClipNetwork, encoder: TextEncoder | None = None):
        self.net = net.eval().requires_grad_(False)
        self.encoder = encoder or TextEncoder()

    @classmethod
    def from_pretrained(cls, folder: str | Path = checkpoint.SHIPPED / "clip") -> "SceneClip":
        """The SceneClip in the package, or a folder that benchmarks/train_clip.py wrote."""
        net = SceneClipNetwork()
        load_network(net, folder, CLIP_FORMAT, "train_clip.py")
        return cls(net)

    def to(self, device: str | torch.device) -> "SceneClip":
        self.net.to(device)
        self.encoder.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts; give the prompt of each picture")
        pixels, device, scores = to_network_input(images), self.net.place.device, []
        for i in range(0, len(pixels), 64):
            text = self.encoder.encode(prompts[i : i + 64]).to(device)
            scores.append(self.net(pixels[i : i + 64].to(device), text).diagonal().cpu())
        return torch.cat(scores)

    def levels(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> features at 1/2, 1/4 and 1/8, for `vqgan_loss.feature_distance`."""
        found = []
        for layer in self.net.see.layers:
            images = layer(images)
            if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
                found.append(images)
        return found


class ClipScorer:
    """A CLIP of `transformers`: images (B, 3, H, W), B prompts -> cosines of image and text embeddings (B,).

    `name` is a folder or a hub id. Each CLIP has its own scale of scores, so always report which one was used.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoProcessor, CLIPModel

        self.processor = AutoProcessor.from_pretrained(name)
        model, info = CLIPModel.from_pretrained(name, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(
                f"{name!r} is not a complete CLIP: it lacks {sorted(info['missing_keys'])[0]!r} and others"
            )
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        settings = {"return_tensors": "pt", "padding": True, "truncation": True}
        inputs = self.processor(text=list(prompts), images=to_pil(images), **settings)
        out = self.model(**inputs.to(self.model.device))
        return F.cosine_similarity(out.image_embeds, out.text_embeds)
