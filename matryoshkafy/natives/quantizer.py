"""MatryoshkaConfig: `from_pretrained` of transformers that cuts a size while it loads.

A folder that `save(doll, folder, to="hf")` wrote holds every size once, as one file per level.
transformers lets a package register a quantizer, which sees the configuration before the model is
built and the weights before they are put in place: ours shrinks the first and reads the second
from the files of the size.
"""

# transformers tells few types.
# pyright: basic
from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from matryoshkafy.natives import sized
from matryoshkafy.natives.recipe import Foreign, NativeError
from matryoshkafy.natives.tree import changed

METHOD = "matryoshka"


class MatryoshkaConfig(QuantizationConfigMixin):
    """Which size of a folder `from_pretrained(folder, quantization_config=...)` loads.

    Args:
        size: one of the folder's sizes; None for the largest.
    """

    quant_method: str

    def __init__(self, size: int | None = None, **_: object) -> None:
        self.quant_method = METHOD
        self.size = size


# Not as a decorator: its type would hide that of the class.
register_quantization_config(METHOD)(MatryoshkaConfig)


@register_quantizer(METHOD)
class MatryoshkaQuantizer(HfQuantizer):
    """What transformers asks while it loads; the model that comes out is a stock one."""

    quantization_config: MatryoshkaConfig
    requires_calibration = False

    def __init__(self, quantization_config: MatryoshkaConfig, **kwargs: Foreign) -> None:
        super().__init__(quantization_config, **kwargs)
        self._read: Read | None = None
        self._size = 0

    def update_attn_implementation(self, config: Foreign) -> Foreign:
        """Return the configuration of the size; transformers builds the model from it."""
        held = getattr(config, sized.KEY, None)
        self._size, fields = sized.fields_of(held, self.quantization_config.size)
        tree = {k: v for k, v in config.to_dict().items() if k not in (sized.KEY, *DROPPED)}
        small = type(config).from_dict(changed(tree, fields))
        small._attn_implementation = config._attn_implementation
        small.quantization_config = self.quantization_config
        small.transformers_weights = sized.NAMES
        return small

    def _process_model_before_weight_loading(self, model: Foreign, **kwargs: Foreign) -> Foreign:
        folder = Path(kwargs["checkpoint_files"][0]).parent
        self._read = Read(folder, self._size, f"{model.base_model_prefix}.")
        return model

    def update_weight_conversions(
        self, weight_conversions: Foreign, model: Foreign
    ) -> list[Foreign]:
        """Every tensor stands under the name that the module has: no other conversion applies."""
        assert self._read is not None
        return [WeightConverter([r"^(.+)$"], [r"\1"], [self._read])]

    def _process_model_after_weight_loading(self, model: Foreign, **kwargs: Foreign) -> Foreign:
        assert self._read is not None
        self._read.sizes.close()
        self.remove_quantization_config(model)
        model._weight_conversions = None  # saving finds the class's own again
        del model.config.transformers_weights
        return model

    @property
    def is_trainable(self) -> bool:
        """A size trains as any stock model does."""
        return True

    def is_serializable(self, *_: Foreign, **__: Foreign) -> bool:
        """A size is saved as any stock model is."""
        return True


DROPPED = ("quantization_config", "is_matryoshka", "matryoshka_dimensions")


class Read(ConversionOps):
    """Puts the values of the size where the loader found a name without values."""

    def __init__(self, folder: Path, size: int, prefix: str) -> None:
        self.sizes = sized.SizeTensors(folder, size)
        self._prefix = prefix

    def __deepcopy__(self, memo: Foreign) -> Read:
        """Each tensor gets its own converter; the open files are shared."""
        return self

    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_dict: dict[str, list[Tensor]], *, full_layer_name: str, **_: Foreign
    ) -> dict[str, Tensor]:
        """Return the tensor, in the type and on the device that the loader wants it."""
        ((empty,),) = input_dict.values()
        stored = self._stored(full_layer_name)
        return {full_layer_name: self.sizes[stored].to(empty.device, empty.dtype)}

    def _stored(self, name: str) -> str:
        """The name in the folder: the base model's tensors go by two, with its prefix or not."""
        names = (name, name.removeprefix(self._prefix), self._prefix + name)
        for candidate in names:
            if candidate in self.sizes:
                return candidate
        raise NativeError(
            f"{self.sizes.folder} names {name}, but holds no values of it; expected the folder as "
            "it was written. Copy it again."
        )
