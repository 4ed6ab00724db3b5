"""Pipelines with a component more than diffusers' own, where diffusers makes one pipeline of another.

`AutoPipelineForText2Image` and its siblings look a pipeline up by its class, and `from_pipe` of any
class leaves behind what that class does not take, without a word.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

from diffusers.pipelines import auto_pipeline


logger = logging.getLogger(__name__)


def register_auto_pipeline(pipeline_class: type, plain_class: type) -> None:
    """Let diffusers' AutoPipelines find a pipeline derived from a plain one.

    Text-to-image gives `pipeline_class` itself; image-to-image and inpainting what they give for the
    plain one.

    Args:
        pipeline_class: text-to-image, with further components.
        plain_class: one that AutoPipelines know; otherwise nothing is registered.
    """
    text_to_image: MutableMapping[str, type] = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    known = [name for name, found in text_to_image.items() if found is plain_class]
    if not known:
        return
    own = f"{known[0]}-{pipeline_class.__name__}"
    text_to_image[own] = pipeline_class
    for mapping in (
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    ):
        if known[0] in mapping:
            mapping[own] = mapping[known[0]]


class HandOver:
    """Mixin, before the pipeline of diffusers: a warning where `from_pipe` leaves a component behind.

    `from_pipe` is a method of the class that is made, and reads no more of the pipeline it gets than
    `config` and `components`; here is where the latter are read.
    """

    # component -> what to do without it
    _left_behind: Mapping[str, str] = {}

    @property
    def components(self) -> dict[str, Any]:
        """As in diffusers: the pipeline's components by name."""
        found = super().components
        caller = sys._getframe(1)
        if caller.f_code.co_name == "from_pipe" and "expected_modules" in caller.f_locals:
            self._warn_of_loss(found, frozenset(caller.f_locals["expected_modules"]))
        return found

    def _warn_of_loss(self, components: Mapping[str, Any], expected: frozenset[str]) -> None:
        said = vars(self).setdefault("_said_to_be_left_behind", set())
        for name, remedy in self._left_behind.items():
            if components.get(name) is None or name in expected or (name, expected) in said:
                continue
            said.add((name, expected))  # some versions read the components several times a call
            logger.warning(
                f"The pipeline that `from_pipe` makes of this {type(self).__name__} has no `{name}`: "
                f"its class takes none. {remedy}"
            )
