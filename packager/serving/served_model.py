"""What is served, in the numbers that a bound on its speed needs: read from config.json and shard headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from packager.errors import BadInput

if TYPE_CHECKING:
    from packager.serving.engine import ServeSpec
    from validation.models import Precision, ServedModel


def served_model(spec: ServeSpec, *, dequantized: bool = False) -> ServedModel | None:
    """The model of a server, with its draft; None: its architecture is not declared here.

    Args:
        dequantized: quantized weights are expanded to BF16 before they are served.
    """
    from packager.serving.engine import speculative_config

    speculation = speculative_config(spec)
    try:
        return model_in(
            str(spec.model),
            precision="bf16" if dequantized else None,
            draft=spec.draft if speculation else None,
            draft_tokens=speculation["num_speculative_tokens"] if speculation else 0,
        )
    except BadInput:
        return None


def model_in(
    source: str,
    *,
    precision: Precision | None = None,
    draft: Path | None = None,
    draft_tokens: int = 0,
) -> ServedModel:
    """A folder with a config.json, or a published architecture by name.

    Args:
        precision: of the weights; None: what the config says.
        draft: folder of an exported head that is served with it, and its tokens a step.

    Raises:
        BadInput: the config cannot be read, or its architecture is not declared here.
        UsageProblem: neither a folder nor a known name.
    """
    from packager.checkpoint.source import CONFIG_NAME, open_folder
    from packager.layouts import Described
    from packager.serving.plan import held_precision, model_bytes, shape_config, shape_of
    from validation.models import ServedModel

    folder = Path(source).expanduser()
    if folder.is_dir():
        opened = open_folder(str(folder))
        config, name = Described.parse(opened.json(CONFIG_NAME), opened.where(CONFIG_NAME)), folder.name
    else:
        config, name = shape_config(source), source
    held = precision or held_precision(config)
    sizes = model_bytes(config, held, draft=draft)
    return ServedModel(
        shape=shape_of(config.model, name),
        precision=held,
        draft_tokens=draft_tokens if draft is not None else None,
        draft_weight_bytes=sizes.draft,
        draft_kv_bytes=sizes.kv_layer if draft is not None else 0.0,
    )
