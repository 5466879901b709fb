"""A native size as a GGUF file, which llama.cpp loads: LLaMA, Mistral, Qwen 2 and 3."""

# gguf and transformers tell few types.
# pyright: basic
from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from matryoshkafy.files.folders import whole_file
from matryoshkafy.natives.recipe import Foreign, NativeError, library

# The class of transformers -> the architecture of llama.cpp, and whether it turns neighbouring
# channels by RoPE, where transformers turns the two halves of a head.
ARCHITECTURES: Mapping[str, tuple[str, bool]] = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


def write_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    vocabulary: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Write a native size as one GGUF file, in its own type; return the absolute path.

    Args:
        model: what `native` returned, of one of the classes in `ARCHITECTURES`.
        path: the file.
        vocabulary: a GGUF file of the full model, whose tokenizer is copied: no size changes it.
            Without it the file has none, and takes token ids alone.
        force: replace a file that stands there.

    Raises:
        NativeError: for another class, scaled rotary tables, another vocabulary, a taken path.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not force:
        raise NativeError(f"{target} exists. Choose another name, or replace it with force.")
    name, turned = _architecture(model)
    with whole_file(target) as fresh:
        _write(model, fresh, (name, turned), vocabulary)
    return target


def _architecture(model: Foreign) -> tuple[str, bool]:
    kind = type(model).__name__
    if kind not in ARCHITECTURES:
        raise NativeError(
            f"a {kind} was given; expected one of {', '.join(ARCHITECTURES)}. Save the size with "
            "to='hf', and let llama.cpp's own convert_hf_to_gguf.py read that folder."
        )
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise NativeError(
            f"the model has rope_type {rope['rope_type']!r}; expected 'default', the only rotary "
            "table that is written here. Save the size with to='hf', and let llama.cpp's own "
            "convert_hf_to_gguf.py read that folder."
        )
    return ARCHITECTURES[kind]


def _write(model: Foreign, path: Path, how: tuple[str, bool], vocabulary: Foreign) -> None:
    gguf = library("gguf")

    name, turned = how
    kinds = {p.dtype for p in model.parameters()}
    if len(kinds) != 1 or not kinds <= TYPES.keys():
        raise NativeError(f"the model holds {kinds}; expected one type. Call model.float().")
    writer = gguf.GGUFWriter(path, name)
    _settings(writer, model.config)
    writer.add_file_type(TYPES[next(iter(kinds))])
    _copy_vocabulary(writer, vocabulary, model.config.vocab_size)
    layers = model.config.num_hidden_layers
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), layers)
    # Each once: a head that is tied to the table is read from the table.
    for key, parameter in model.named_parameters():
        tensor = parameter.detach()
        stored = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise NativeError(f"llama.cpp has no tensor for {key}. Save the size with to='hf'.")
        _add(writer, stored, _paired(key, tensor, model.config) if turned else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _settings(writer: Foreign, config: Foreign) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    width = _head(config)
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)


def _head(config: Foreign) -> int:
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def _paired(name: str, tensor: Tensor, config: Foreign) -> Tensor:
    """Interleave the two halves of each head: channel i and i + half become neighbours."""
    if not name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        return tensor
    halves = tensor.reshape(-1, 2, _head(config) // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add(writer: Foreign, name: str, tensor: Tensor) -> None:
    """Vectors are float32 in every file of llama.cpp."""
    gguf = library("gguf")

    if tensor.dim() == 1:
        tensor = tensor.float()
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())


def _copy_vocabulary(writer: Foreign, path: Foreign, size: int) -> None:
    gguf = library("gguf")

    if path is None:
        writer.add_tokenizer_model("no_vocab")
        return
    fields = gguf.GGUFReader(path).fields
    known = fields.get("tokenizer.ggml.tokens")
    count = 0 if known is None else len(known.data)
    if count != size:
        raise NativeError(
            f"{path} has a vocabulary of {count}, the model one of {size}; expected the GGUF file "
            "of the full model, whose vocabulary no size changes. Give that file."
        )
    for key, field in fields.items():
        if key.startswith("tokenizer."):
            kinds = [*field.types, None]
            writer.add_key_value(key, field.contents(), kinds[0], kinds[1])
