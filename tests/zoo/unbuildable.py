"""What the zoo leaves out, and why."""

from __future__ import annotations

UNBUILDABLE: dict[str, str] = {
    "torchvision:s3d": "pools 7 x 7, so it needs 14 frames of 224 x 224 pixels: over 3 s",
    "torchvision:keypointrcnn": "same parts as tv_fasterrcnn, 60 M parameters at the least",
    "torchvision:maskrcnn": "same parts as tv_fasterrcnn, 44 M parameters at the least",
    "open_clip:scaled_cosine_attn": "its forward raises in 3.3 ('batch1 must be a 3D tensor')",
    "open_clip:roberta, mt5, nllb": "the text tower asks the hub for its config",
    "timm:mobilenetv5_300m": "300 M parameters; mobilenetv5_base stands for it",
    "timm:gemma4_vit_570m": "570 M parameters; a small gemma4_vit_167m stands for it",
    "transformers:align": "its EfficientNet tower has 60 M parameters whatever the config",
    "transformers:blt": "hashed tables of 3,000,012 rows fixed by the class",
    "transformers:chameleon": "the vocabulary map is None unless read from a tokenizer",
    "transformers:clvp": "speech tokens and a conditioning encoder tied to fixed widths",
    "transformers:emu3": "the vocabulary map is None unless read from a tokenizer",
    "transformers:kosmos_2": "needs the mask of image positions and its latent queries together",
    "transformers:time_series_transformer": "needs lags, static features and a sampled output",
    "transformers:autoformer, informer": "as time_series_transformer",
    "transformers:musicgen": "audio codes over 4 codebooks and two frozen models beside it",
    "transformers:bark, dac, dia": "codecs of 10 M parameters and more whatever the config",
    "transformers:qwen2_vl, qwen2_5_vl": "ragged image grids: positions come from Python loops",
    "transformers:sam2, sam2_video": "hiera backbones of 27 M parameters with a memory bank",
    "transformers:rt_detr, d_fine, rf_detr": "backbones of 20 M parameters; detr stands for them",
    "transformers:deformable_detr": "backbone asks the hub; its sampling kernel is compiled",
    "transformers:mask2former, maskformer, oneformer": "pixel decoders over several backbones",
    "transformers:univnet": "a vocoder whose output is sampled",
    "transformers:dinat": "its neighbourhood attention is a compiled kernel (natten)",
    "transformers:rag": "a retriever with an index",
}
