"""What importing the package makes known: its components to diffusers, the eraser to PEFT."""

from __future__ import annotations

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

import diffusers_ext.eraser.adapter.model  # noqa: F401

# diffusers finds the components of other libraries by the names of their base classes: by the library
# when it saves, among those of all libraries when it loads.
_LOADABLE = {"ModelMixin": ["save_pretrained", "from_pretrained"], "Artifact": ["save_pretrained", "from_pretrained"]}
LOADABLE_CLASSES.setdefault("diffusers_ext", _LOADABLE)
for _name, _methods in _LOADABLE.items():
    ALL_IMPORTABLE_CLASSES.setdefault(_name, _methods)
