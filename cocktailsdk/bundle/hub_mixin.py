"""Nets on the Hugging Face hub, by the mixin that its own client offers libraries."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, ModelHubMixin
from torch import nn

from ..errors import BundleError
from ..models import best_record
from ..net.subnet_model import SubnetModel
from ..printable import printable
from ..utils.score_text import score_text
from .hub import first_line
from .read import load_bundle
from .write import save_bundle

__all__ = ["HubMixin"]

CARD = """# {count} networks in one bundle

A {model} and {sparse} sparse subnetworks of it, which share its weights, made with
[Cocktail](https://pypi.org/project/cocktailsdk/):

```python
import cocktailsdk

net = cocktailsdk.from_pretrained("{repo}"{argument})
net.switch({name!r})
```

| network | sparsity | metric |
| --- | --: | --: |
{rows}
{score}
`weights.safetensors` alone is the dense network, as any checkpoint.
"""


class HubMixin(ModelHubMixin, library_name="cocktailsdk", tags=["pruning", "sparsity"]):
    """What makes a net one that can be saved, pushed and loaded by name.

    What the mixin does of itself with a ``config.json`` has no use here: a bundle says all that is needed.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Without the mixin's record of arguments: a net is made of tensors, not of a configuration."""
        del args, kwargs
        return object.__new__(cls)

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the bundle: the dense weights once, packed masks, statistics, metrics, provenance.

        Two calls write the same bytes, whatever subnetwork is active. See :mod:`cocktailsdk.bundle`.

        Args:
            save_directory: The folder. A bundle that is there is replaced in one step.
            dtype: ``torch.float16`` or ``torch.bfloat16`` to store parameters of more bits in these, rounded to the
                nearest; masks, buffers and statistics are stored exactly all the same.
            config: Nothing: a bundle has no configuration. Put JSON values in :attr:`CocktailNet.provenance`.
            repo_id: As for :meth:`push_to_hub`; by default the folder's name.
            push_to_hub: Whether to push the same to the hub.
            model_card_kwargs: As for :meth:`push_to_hub`.
            **push_to_hub_kwargs: As for :meth:`push_to_hub`.

        Returns:
            The address of the commit, where it was pushed.

        Raises:
            BundleError: The folder holds something else, a subnetwork has no mask yet, a weight is too large for
                float16, or the hub refused.
        """
        if config is not None:
            raise BundleError("a bundle has no configuration; put JSON values in net.provenance")
        save_bundle(self._net(), save_directory, dtype=dtype)
        if not push_to_hub:
            return None
        name = repo_id or Path(save_directory).name
        return self.push_to_hub(name, dtype=dtype, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | str | None = None,
        config: Any = None,
        commit_message: str = "Push a bundle with cocktailsdk",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Push the bundle and a model card to the Hugging Face hub, in one commit.

        Args:
            repo_id: ``"user/name"``; the repository is made if it is not there.
            dtype: As for :meth:`save_pretrained`.
            config: Nothing, as for :meth:`save_pretrained`.
            commit_message: What the commit says.
            private: Whether a new repository is private.
            token: The access token; by default the one that the hub's client has stored.
            branch: The branch; by default ``main``.
            create_pr: Whether to open a pull request instead.
            allow_patterns: Push only files that match.
            ignore_patterns: Leave out files that match.
            delete_patterns: Delete files of the repository that match, in the same commit.
            model_card_kwargs: Metadata of the card besides (``license``, ``datasets``, ``metrics``).

        Returns:
            The address of the commit.

        Raises:
            BundleError: The bundle cannot be written, or the hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as beside:
            folder = Path(beside) / "bundle"
            self.save_pretrained(folder, dtype=dtype, config=config)
            self.generate_model_card(repo_id=repo_id, **(model_card_kwargs or {})).save(folder / "README.md")
            try:
                api = HfApi(token=token)
                repo = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
                return api.upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                    allow_patterns=allow_patterns,
                    ignore_patterns=ignore_patterns,
                    delete_patterns=delete_patterns,
                )
            except Exception as e:  # the client raises its own errors, its HTTP library's and the system's
                raise BundleError(
                    f"the bundle could not be pushed to {repo_id!r} ({type(e).__name__}: {first_line(e)}). Is there a "
                    "network, is HF_HUB_OFFLINE unset, and have you logged in (hf auth login)?"
                ) from e

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        model: nn.Module | None = None,
        *,
        subnets: Iterable[str] | None = None,
        **options: Any,
    ) -> Self:
        """Load a bundle; the same as :func:`cocktailsdk.from_pretrained`."""
        net_type: Any = cls  # a mixin cannot say that it is mixed into a SubnetModel
        return load_bundle(pretrained_model_name_or_path, model, net_type=net_type, subnets=subnets, **options)

    def generate_model_card(self, repo_id: str = "user/name", **metadata: Any) -> ModelCard:
        """A card that lists the networks and says how to load them.

        Args:
            repo_id: The repository.
            **metadata: Of the card (``license``, ``datasets``, ``metrics``).
        """
        net = self._net()
        # Private (huggingface_hub 2.4), and the one place where the mixin keeps the library's name and tags.
        data = type(self)._hub_mixin_info.model_card_data.to_dict()
        head = ModelCardData(**{**data, **metadata})
        rows = []
        for name in net.names:
            metric = net.metrics.get(name)
            shown = "–" if metric is None else f"{metric:.4f}"
            rows.append(f"| `{name}` | {net.subnet(name).sparsity:.3f} | {shown} |")
        text = CARD.format(
            count=len(net.names),
            sparse=len(net.names) - 1,
            model=type(net.model).__name__,
            repo=repo_id,
            argument=", model" if best_record(net.model)[1] else "",
            name=net.names[-1],
            rows="\n".join(rows),
            score=_score_line(net),
        )
        return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}")

    def _net(self) -> SubnetModel:
        return cast(SubnetModel, self)


def _score_line(net: SubnetModel) -> str:
    """By what masks were ranked, as a paragraph; empty where by magnitude."""
    text = score_text(net.provenance.get("score"))
    return f"\nMasks are ranked by {printable(text)}.\n" if text else ""
