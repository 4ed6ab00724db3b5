"""Modular pipelines of diffusers with steps of this package: composed, saved and shared as a few lines of code."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import diffusers
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from huggingface_hub import ModelCard, ModelCardData

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.hub.card import Card, mark_generated
from diffusers_ext.hub.kinds import Licence, find_licence, public_name
from diffusers_ext.hub.push import push_folder

CODE_NAME, CLASS_NAME = "modular_blocks", "Blocks"
_CODE = '''"""Blocks of a modular pipeline of diffusers, with steps of diffusers_ext, which must be installed."""

from diffusers_ext import {imports}


class {name}(ExtendedBlocks):
    base = "{base}"
    steps = ({steps},)
'''
_CARD = """# {repo_id}

{description}

```python
from diffusers import ModularPipeline

pipe = ModularPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
pipe.load_components()
```

The code of this repository is `{code}.py`, which only names the classes of the installed package `diffusers_ext` that
it composes; nothing of it runs without `trust_remote_code=True`. Further arguments of the pipeline's call: {inputs}.

{licence}
"""


class ExtensionStep(ModularPipelineBlocks):
    """A step that knows its place in the blocks of diffusers."""

    name: ClassVar[str]  # of the step among them

    def extend(self, blocks: ModularPipelineBlocks) -> None:
        """Put copies of the step into `blocks`, which are changed; `ValueError` where there is no place for it."""
        raise TypeError(f"{type(self).__name__} must define `extend`.")

    def after(self, blocks: ModularPipelineBlocks, belongs: Callable[[ModularPipelineBlocks], bool]) -> int:
        """Insert the step after each block that `belongs` chooses; how many there are."""
        count = 0
        for parent in list(_sequences(blocks)):
            for name in [name for name, block in parent.sub_blocks.items() if belongs(block)]:
                own = f"{name.rpartition('.')[0]}.{self.name}".lstrip(".")
                parent.sub_blocks.insert(own, deepcopy(self), list(parent.sub_blocks).index(name) + 1)
                count += 1
        return count


class DenoisingStep(ExtensionStep):
    """A step that holds while the denoiser runs, and leaves it as it was: the denoising goes on inside `around`."""

    inner: LoopSequentialPipelineBlocks | None = None

    def around(self, components: Any, state: PipelineState) -> AbstractContextManager[Any]:
        """What holds while the denoiser runs."""
        raise TypeError(f"{type(self).__name__} must define `around`.")

    def own_inputs(self) -> list[InputParam]:
        """Arguments of the pipeline's call that the step reads."""
        return []

    def own_configs(self) -> list[ConfigSpec]:
        """Settings of the pipeline that the step reads; they are saved with it."""
        return []

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Those of the denoising inside the step."""
        return self.inner.expected_components if self.inner else []

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        """Those of the step and of the denoising inside it."""
        return [*(self.inner.expected_configs if self.inner else []), *self.own_configs()]

    @property
    def inputs(self) -> list[InputParam]:
        """Those of the step and of the denoising inside it."""
        return [*(self.inner.inputs if self.inner else []), *self.own_inputs()]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Those of the denoising inside the step."""
        return self.inner.intermediate_outputs if self.inner else []

    def extend(self, blocks: ModularPipelineBlocks) -> None:
        """Go around every denoising loop."""
        count = 0
        for parent in list(_holders(blocks)):
            for name, block in list(parent.sub_blocks.items()):
                if isinstance(block, (LoopSequentialPipelineBlocks, DenoisingStep)):
                    step = deepcopy(self)
                    step.inner = block
                    parent.sub_blocks[name] = step
                    count += 1
        if not count:
            raise ValueError(
                f"`base` must denoise in a loop for a {type(self).__name__}, got {type(blocks).__name__}."
            )

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Of the denoising inside the step."""
        self.inner.set_progress_bar_config(**kwargs)

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Denoise inside `around`."""
        with self.around(components, state):
            return self.inner(components, state)


class ExtendedBlocks(SequentialPipelineBlocks):
    """Blocks of diffusers with steps of this package at their places.

    The code of a shared pipeline is a subclass that names both; see `push_modular_pipeline`.

    Args:
        base: class of diffusers such as `"FluxAutoBlocks"`; a subclass's own by default.
        steps: classes such as `GoldenNoiseStep`; a subclass's own by default.
    """

    base: ClassVar[str]
    steps: ClassVar[Sequence[type[ExtensionStep]]] = ()

    def __init__(
        self, base: str | type[SequentialPipelineBlocks] | None = None, steps: Sequence[type[ExtensionStep]] = ()
    ) -> None:
        if base is not None:
            self.base = base if isinstance(base, str) else base.__name__
            self.steps = tuple(steps)
        found = getattr(diffusers, self.base, None) if isinstance(self.base, str) else None
        if not (isinstance(found, type) and issubclass(found, SequentialPipelineBlocks)):
            raise ValueError(
                f"`base` must be a class of diffusers' modular blocks, such as 'FluxAutoBlocks', got {self.base!r} of "
                f"diffusers {diffusers.__version__}."
            )
        for step in self.steps:
            if not (isinstance(step, type) and issubclass(step, ExtensionStep)):
                raise TypeError(f"`steps` must be classes of steps such as GoldenNoiseStep, got {step!r}.")
        # Instances among the blocks of diffusers are shared by all pipelines.
        self._plain = deepcopy(found())
        for step in self.steps:
            step().extend(self._plain)
        self.sub_blocks, self._workflow_map = self._plain.sub_blocks, self._plain._workflow_map
        self.block_names = list(self.sub_blocks)
        self.block_classes = [type(block) for block in self.sub_blocks.values()]

    @property
    def model_name(self) -> str:
        """By which diffusers finds the class of the pipeline."""
        return self._plain.model_name

    @property
    def description(self) -> str:
        """Of the blocks and of each step."""
        return "\n".join([self._plain.description, *(step().description for step in self.steps)])

    @property
    def outputs(self) -> list[OutputParam]:
        """Those of the blocks of diffusers."""
        return self._plain.outputs

    def init_pipeline(self, *args: Any, **kwargs: Any) -> ModularPipeline:
        """As in diffusers, of the class that its own blocks have."""
        name = f"{self.base.removesuffix('Blocks').removesuffix('Auto')}ModularPipeline"
        found = getattr(diffusers, name, None)
        return super().init_pipeline(*args, **kwargs) if found is None else found(deepcopy(self), *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `modular_config.json` and the few lines of code that it names."""
        if push_to_hub:
            raise ValueError("`push_to_hub` must be False, got True. Share the pipeline by `push_modular_pipeline`.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        names = [step.__name__ for step in self.steps]
        code = _CODE.format(
            name=CLASS_NAME,
            base=self.base,
            steps=", ".join(names),
            imports=", ".join(sorted({"ExtendedBlocks", *names})),
        )
        write_atomically(folder / f"{CODE_NAME}.py", code)
        config = {
            "_class_name": CLASS_NAME,
            "_diffusers_version": diffusers.__version__,
            "auto_map": {"ModularPipelineBlocks": f"{CODE_NAME}.{CLASS_NAME}"},
        }
        write_atomically(folder / self.config_name, json.dumps(config, indent=2) + "\n")


def save_modular_pipeline(pipeline: ModularPipeline, save_directory: str | os.PathLike) -> None:
    """Save a pipeline of `ExtendedBlocks`: its code, `modular_model_index.json`, and the components it must bring.

    Components of a repository of the Hub stay there, and the index names it; all others are saved.
    """
    _write(pipeline, Path(save_directory), str(save_directory))


def push_modular_pipeline(
    pipeline: ModularPipeline,
    repo_id: str,
    *,
    base_model: str,
    license: str | Licence | None = None,
    token: str | None = None,
    **hub: Any,
) -> str:
    """Share what `save_modular_pipeline` saves, with a card, in one commit; returns its address.

    `ModularPipeline.from_pretrained(repo_id, trust_remote_code=True)` loads it where this package is installed.

    Args:
        base_model: Hub name of the model whose components the pipeline has.
        license: as of the base model when `None`.
        hub: of `push_folder`: `private`, `revision`, `create_pr`, `commit_message`.
    """
    blocks, licence = _blocks(pipeline), find_licence(base_model, license, token=token)
    if "/" not in repo_id:
        raise ValueError(f"`repo_id` must be 'user/name', got {repo_id!r}: the index names it.")
    for spec in blocks.expected_configs:
        value = pipeline.config[spec.name]
        if isinstance(value, str) and Path(value).exists():
            raise ValueError(f"`{spec.name}` must be on the Hub to be shared, got the path {value}. Push it first.")
    plain = {known.name for known in getattr(diffusers, blocks.base)().inputs}
    inputs = ", ".join(f"`{known.name}`" for known in blocks.inputs if known.name and known.name not in plain)
    text = _CARD.format(
        repo_id=repo_id, description=blocks.description, code=CODE_NAME, inputs=inputs, licence=licence.sentence
    )
    data = ModelCardData(
        base_model=public_name(base_model), library_name="diffusers", tags=["modular-diffusers"], **vars(licence)
    )

    def card(name: str) -> Card:
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{mark_generated(text)}\n")

    with tempfile.TemporaryDirectory() as folder:
        _write(pipeline, Path(folder), repo_id)
        return push_folder(folder, repo_id, card, token=token, **hub)


def _blocks(pipeline: ModularPipeline) -> ExtendedBlocks:
    blocks = getattr(pipeline, "_blocks", None)
    if not isinstance(blocks, ExtendedBlocks):
        raise TypeError(
            f"`pipeline` must be a modular pipeline of ExtendedBlocks, got a {type(pipeline).__name__} of "
            f"{type(blocks).__name__}. Make it by `ExtendedBlocks(base, steps).init_pipeline(...)`."
        )
    return blocks


def _write(pipeline: ModularPipeline, folder: Path, source: str) -> None:
    """Save into a folder what is to be found at `source`, which is its path or the name of a repository."""
    blocks = _blocks(pipeline)
    index: dict[str, Any] = {"_class_name": type(pipeline).__name__, "_diffusers_version": diffusers.__version__}
    index["_blocks_class_name"] = CLASS_NAME
    index |= {spec.name: pipeline.config[spec.name] for spec in blocks.expected_configs}
    for name, spec in pipeline._component_specs.items():
        if spec.default_creation_method != "from_pretrained":
            continue
        _, _, entry = pipeline.config[name]
        library, kind = entry["type_hint"]
        component = getattr(pipeline, name)
        if component is not None and not _on_hub(spec):
            component.save_pretrained(folder / name)
            entry = {**entry, "pretrained_model_name_or_path": source, "subfolder": name}
            entry |= {"variant": None, "revision": None}
        index[name] = [library, kind, entry]
    blocks.save_pretrained(folder)
    write_atomically(folder / ModularPipeline.config_name, json.dumps(index, indent=2) + "\n")


def _on_hub(spec: ComponentSpec) -> bool:
    """Whether others can load a component from where it came."""
    source = spec.pretrained_model_name_or_path
    return source is not None and not os.path.isabs(source) and not Path(source).exists()


def _holders(blocks: ModularPipelineBlocks) -> Iterator[ModularPipelineBlocks]:
    """All blocks in blocks that hold others, but for loops."""
    if isinstance(blocks, LoopSequentialPipelineBlocks) or not blocks.sub_blocks:
        return
    yield blocks
    for part in list(blocks.sub_blocks.values()):
        yield from _holders(part)


def _sequences(blocks: ModularPipelineBlocks) -> Iterator[ModularPipelineBlocks]:
    """Those of them whose parts run one after the other."""
    return (block for block in _holders(blocks) if isinstance(block, SequentialPipelineBlocks))
