"""The scorer: a small CLIP of our own for scenes, so that a CLIP score needs no network (Muse 3.2).

    image (B, 3, 64, 64) --convolutions, attention--> 64 cells (B, 64, d) ------------------+--> score (B,) in [-1, 1]
    prompt --the frozen language model, attention--> a vector a text token (B, L, d) -------+

The score is the mean over text tokens of the largest cosine with a cell (FILIP, arXiv 2111.07783): a token looks for
its thing. It fits where `metrics.ClipScorer` does. It is for measuring alone: it shares no weights, training run or
data seed with the reader or a perceptual network, and has seen no scene of split "train" and no generated picture.

B pictures, T texts, L text tokens, d = 48. Not here: how it was trained (`train_scorer.py`), accuracy (`eval_prompts.py`).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from minimuse import checkpoint
from minimuse.eval_detector import SIZE, Images, _pixels
from minimuse.text import Context, TextEncoder
from minimuse.vqgan import Encoder, VQGANConfig

FORMAT, D = "minimuse-scorer-1", 48
TOWER = VQGANConfig(SIZE, 1, D, 16, (1, 2, 3, 3), (0, 0, 1, 1), 16, (0, 0, 0, 0))  # of it, the encoder alone


class Network(nn.Module):
    """The two towers; `width` is the language model's."""

    def __init__(self, width: int = 384):
        super().__init__()
        mixing = [nn.TransformerEncoderLayer(D, 4, 2 * D, 0.0, F.gelu, batch_first=True, norm_first=True) for _ in "it"]
        self.see, (self.mix_cells, self.mix_words) = Encoder(TOWER), mixing
        self.place = nn.Parameter(torch.randn(TOWER.grid**2, D) * 0.1)
        self.hear = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, D))
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
        """B images, T texts -> (B, T): how well each fits each."""
        best = torch.einsum("bcd,tld->btlc", self.cells(images), self.words(text)).amax(-1)
        return (best * text.mask).sum(-1) / text.mask.sum(-1)


class Scorer:
    """A trained network and its language model: images, B prompts -> scores (B,).

    >>> Scorer.from_pretrained()(images, ["a red cube"] * len(images))
    """

    def __init__(self, net: Network, encoder: TextEncoder | None = None):
        self.net, self.encoder = net.eval().requires_grad_(False), encoder or TextEncoder()

    @classmethod
    def from_pretrained(cls, folder: str | Path = checkpoint.SHIPPED / "scorer") -> "Scorer":
        """The scorer in the package, or one that `train_scorer.py` wrote."""
        path, net = Path(folder, checkpoint.CONFIG), Network()
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {path.name}; python -m minimuse.train_scorer trains a scorer")
        if (found := checkpoint.read_json(path).get("format")) != FORMAT:
            raise ValueError(f"{path} is not of this scorer: its format is {found!r}, expected {FORMAT!r}")
        weights = load_file(path.with_name(checkpoint.WEIGHTS))
        checkpoint.check_weights(net.state_dict(), weights, folder)
        net.load_state_dict(weights)
        return cls(net)

    def to(self, device: str | torch.device) -> "Scorer":
        self.net.to(device)
        self.encoder.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts: give the prompt of each picture")
        pixels, scores, device = _pixels(images), [], self.net.place.device
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
