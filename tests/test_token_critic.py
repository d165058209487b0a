"""notebooks/token_critic.py: a scoring network learns to tell drawn tokens from real ones."""

import sys

import torch
from conftest import ROOT

sys.path.append(str(ROOT / "notebooks"))
from token_critic import critic, learned_score, train_critic


def test_a_critic_learns_to_tell_drawn_from_real(tiny_muse):
    """Each row repeats one code, and the untrained base model draws any, so a token that differs was drawn."""
    base = tiny_muse.base
    tokens = torch.arange(16).repeat(8)[:, None].expand(-1, 64)
    texts = tiny_muse.encoder.encode(["a red cube"] * len(tokens))
    losses, nets = zip(*train_critic(base, tokens, texts, steps=80, learning_rate=3e-3), strict=True)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), f"it does not learn: {losses[::10]}"
    odd = torch.arange(16)[:, None].expand(-1, 64).clone()
    odd[:, [3, 20, 41]] = (odd[:, [3, 20, 41]] + torch.tensor([1, 5, 9])) % 16
    score = learned_score(nets[-1])
    lowest = score(odd).topk(3, largest=False).indices.sort(1).values
    assert (lowest == torch.tensor([3, 20, 41])).float().mean() > 0.8, "the tokens that differ have the lowest scores"
    settings = {"order": critic(score), "steps": 4, "superres": {"order": None, "remask": False}}
    first, second = (tiny_muse.generate("a red cube", seed=0, remask=r, **settings)[0] for r in (False, True))
    assert first.tobytes() != second.tobytes(), "with remask, a critic may take tokens back"
    assert not any(p.requires_grad for p in [*base.parameters(), *nets[-1].parameters()])
