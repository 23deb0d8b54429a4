"""The result of an inspection: its findings, with what explains and draws them."""

from __future__ import annotations

from .findings import Findings
from .svg import draw
from .why import Why, why

__all__ = ["Inspection"]


class Inspection(Findings):
    """What :func:`inspect` found.

    Attributes:
        model: The model's class.
        inputs: The example inputs, in words.
        followed: Whether the graph is known; otherwise no channel can go, and ``kept`` says why.
        layers: Every weight, in order of execution.
        groups: The channel groups.
        kept: What is kept whole, and why.
        params: Parameters of the model.
        flops: FLOPs (2 x multiply-adds) of one forward pass on the example inputs.
        savings: What each pattern could save.
        stays: By axis, what of the parameters and buffers in the graph must stay, why, and how the cause comes there.
        modules: Paths of all modules.
        tensors: Parameters and buffers in the model, each with its shape.
        proven: Whether it was shown, by slimming half of every group, that all of them can be slimmed. Models on the
            meta device hold no values to show it on.
    """

    def why(self, name: str) -> Why:
        """Whether the channels of a module or parameter can go, with which group, and if not, why they are kept.

        Args:
            name: A module's path or a parameter's name, as in ``named_modules()`` and ``named_parameters()``.

        Returns:
            The answer; ``str()`` of it is a few sentences.

        Raises:
            CocktailError: There is no such module or parameter; the message has the nearest names.

        Example:
            ```python
            print(cocktail.inspect(model, (x,)).why("layer4.2.conv3"))
            ```
        """
        return why(self, name)

    def to_svg(self, title: str | None = None) -> str:
        """The coupling as a picture: layers in order of execution, a coloured line for each channel group.

        A filled dot on a line makes the group's channels, a ring reads them; grey is kept, with the reason as a
        tooltip. Repeated blocks are drawn once. The same model always gives the same bytes.

        Args:
            title: Stands above; the model's class where none is given.
        """
        return draw(self, title or self.model)
