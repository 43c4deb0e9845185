"""Rules and policies: what a model must hold to be published, and the policies that ship."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from salun_core.config import Document, load, parse, parse_text
from salun_core.digest import digest_json
from salun_core.errors import unknown_name
from salun_core.evaluation.evidence import Evidence
from salun_core.plugins import PluginRecord, names

State = Literal["before", "after", "reference", "origin"]
Kind = Literal["samples", "class", "subject", "concept"]
Level = Literal["retrained", "measured", "procedure", "nothing_to_erase"]
ADVERSE: Mapping[str, Literal["low", "high"]] = {"<=": "high", ">=": "low"}
"""End of the interval that speaks against a rule: if it holds, the rule is shown."""


class Relative(Document):
    """A threshold computed from the evidence: `scale * metric.state + offset`."""

    metric: str = Field(description="metric to take the threshold from")
    state: State = Field(
        default="before", description="model it was measured on; `origin`: the last full training of the line"
    )
    scale: float = Field(default=1.0, allow_inf_nan=False, description="factor")
    offset: float = Field(default=0.0, allow_inf_nan=False, description="added to the product, as a ratio")


class Rule(Document):
    """One condition on the model after unlearning."""

    metric: str = Field(description="name of a metric in the evidence")
    op: Literal["<=", ">=", "within", "inside"] = Field(
        description="`within`: |metric - threshold| <= tolerance; `inside`: both ends of the 95 % interval are within, "
        "which is an equivalence test"
    )
    value: float | None = Field(default=None, allow_inf_nan=False, description="fixed threshold, as a ratio")
    relative_to: Relative | None = Field(default=None, description="threshold computed from the evidence")
    tolerance: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="for `within` and `inside`")
    or_reference: bool = Field(
        default=False,
        description="compare with the retrained model's value if the evidence has one: the centre of `inside`, and the "
        "threshold of `<=` if it is above `value`",
    )
    judge: Literal["value", "low", "high"] = Field(
        default="value", description="compare the value after, or an end of its 95 % interval"
    )
    undecided: Literal["refuse", "procedure"] = Field(
        default="refuse",
        description="what follows if a part of the interval satisfies the rule: refuse, or the level `procedure`",
    )
    unless_retrained: bool = Field(
        default=False,
        description="leave the rule out for a model that was retrained from fresh weights, which is exact",
    )
    targets: list[Kind] = Field(default=[], description="forget targets that the rule applies to; empty: all")
    min_n: int = Field(default=1, ge=1, description="minimum number of samples behind the metric")
    reason: str = Field(min_length=1, description="why the rule exists, for the report")

    @model_validator(mode="after")
    def _one_threshold(self) -> Rule:
        if (self.value is None) == (self.relative_to is None):
            raise ValueError("give exactly one of `value` and `relative_to`")
        if (self.op in ("within", "inside")) != (self.tolerance is not None):
            raise ValueError("`within` and `inside` need a `tolerance`, and no other operator takes one")
        if self.op == "inside" and self.judge != "value":
            raise ValueError("`inside` judges both ends: leave `judge` out")
        if self.or_reference and (self.op not in ("inside", "<=") or self.value is None):
            raise ValueError("`or_reference` is for `inside` and for `<=` with a `value`")
        if self.undecided == "procedure" and not self.shows:
            raise ValueError("`undecided` needs `inside`, `<=` with `judge: high`, or `>=` with `judge: low`")
        return self

    @property
    def shows(self) -> bool:
        """Whether the rule holds only if the whole interval satisfies it."""
        return self.op == "inside" or ADVERSE.get(self.op) == self.judge


class Policy(Document):
    """A named list of rules; all that apply must hold."""

    format: Literal["salun.policy/v1"] = "salun.policy/v1"
    name: str = Field(min_length=1)
    levels: dict[Kind, list[Level]] = Field(
        default={}, description="assurance levels that may be published, by kind of forget target; any if left out"
    )
    plugins: Literal["forbid"] | list[str] | None = Field(
        default=None,
        description="plug-ins that may have made or measured a model: `forbid`, or a list of distributions and "
        "package:object, each perhaps with @sha256:DIGEST; left out: only the architecture of the model line",
    )
    rules: list[Rule] = Field(min_length=1)

    def refused(self, used: Sequence[PluginRecord]) -> list[PluginRecord]:
        """Return the plug-ins that the policy does not allow.

        A policy that says nothing forbids code that a parameter of the run can choose: methods, metrics and attacks.
        The architecture comes with the model line, which no parameter changes.
        """
        if self.plugins is None:
            return [record for record in used if record.kind != "architecture"]
        allowed = [] if self.plugins == "forbid" else self.plugins
        return [record for record in used if not names(allowed, record)]

    @property
    def digest(self) -> str:
        """SHA-256 of the policy's canonical JSON; optional fields count only if they are set."""
        document = self.model_dump(mode="json")
        if not self.levels:
            del document["levels"]
        if self.plugins is None:
            del document["plugins"]
        for rule in document["rules"]:
            for name, default in (("or_reference", False), ("undecided", "refuse"), ("unless_retrained", False)):
                if rule[name] == default:
                    del rule[name]
        return digest_json(document)


def shipped_policies() -> list[str]:
    """Return the names of the policies that ship."""
    return sorted(_shipped())


def _shipped() -> dict[str, Traversable]:
    folder = importlib.resources.files("salun_core") / "policies"
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}


def load_policy(source: str | Path) -> Policy:
    """Read a shipped policy by its name (`classifier`), or a policy from a file.

    Raises:
        UsageError: the policy does not exist, or the file has faults (all are listed).
    """
    shipped = _shipped()
    if str(source) in shipped:
        text = shipped[str(source)].read_text(encoding="utf-8")
        return parse(Policy, parse_text(text, f"policy {source}"), f"policy {source}")
    if "/" not in str(source) and "." not in str(source):
        raise unknown_name("policy", str(source), shipped)
    return load(Policy, Path(source))


def default_policy(evidence: Evidence) -> str:
    """Return the name of the shipped policy for the kind of model that the evidence describes."""
    generation = evidence.generation
    return "classifier" if generation is None else policy_of_images(generation.task, bool(generation.detector))


def policy_of_images(task: str, nudity: bool) -> str:
    """Return the name of the shipped policy of a diffusion model; `task` is class-conditional or text-to-image."""
    if task == "class-conditional":
        return "ddpm"
    return "nsfw" if nudity else "stable-diffusion"
