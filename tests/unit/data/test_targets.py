import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salun_core.data.targets import ConceptTarget, parse_target, redact
from salun_core.errors import UsageError

CONCEPT = {"kind": "concept", "prompts": ["a parachute", "sky diving"], "anchor_prompt": "a bird"}


def test_a_concept_has_prompts_an_anchor_and_a_number_of_images():
    found = parse_target({**CONCEPT, "prompts": ["  a parachute\n", "sky  diving"], "neighbours": [" a kite "]}, "x")
    assert (found.prompts, found.anchor_prompt) == (["a parachute", "sky  diving"], "a bird")
    assert (found.images, found.neighbours) == (64, ["a kite"])
    assert parse_target({**CONCEPT, "images": 2}, "x").images == 2


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prompts": []}, "at least 1 item"),
        ({"prompts": ["a parachute", " \t "]}, "prompts.1: Value error, a prompt is empty"),
        ({"anchor_prompt": ""}, "anchor_prompt: Value error, a prompt is empty"),
        ({"neighbours": [""]}, "neighbours.0: Value error, a prompt is empty"),
        ({"anchor_prompt": " A  Parachute "}, "a prompt equals `anchor_prompt`"),
        ({"prompts": ["straße"], "anchor_prompt": "STRASSE"}, "a prompt equals `anchor_prompt`"),
        ({"prompts": ["a parachute", "A parachute"]}, "a prompt occurs twice"),
        ({"neighbours": ["kite", "kite "]}, "a prompt occurs twice"),
        ({"neighbours": ["kite", "Sky  Diving"]}, "`neighbours` is to be forgotten too"),
        ({"images": 1}, "greater than or equal to 2"),
        ({"images": 100_001}, "less than or equal to 100000"),
        ({"images": "64"}, "valid integer"),
        ({"neighbors": ["kite"]}, "did you mean 'neighbours'"),
    ],
)
def test_invalid_concepts_are_refused_without_quoting_their_prompts(changes, why):
    with pytest.raises(UsageError, match=why) as refused:
        parse_target({**CONCEPT, **changes}, "x")
    assert not [word for word in ("arachute", "diving", "bird", "tra") if word in str(refused.value).lower()]


def test_the_pseudo_id_of_a_concept_is_a_digest_of_its_content():
    document = {**CONCEPT, "images": 64, "neighbours": []}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    expected = f"concept/{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    assert ConceptTarget.model_validate(CONCEPT).pseudo_id == expected
    changes = ({"images": 65}, {"neighbours": ["kite"]}, {"anchor_prompt": "x"}, {"prompts": ["x"]})
    others = {ConceptTarget.model_validate({**CONCEPT, **change}).pseudo_id for change in changes}
    assert len(others | {expected}) == 5


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(st.lists(_TEXT, min_size=1, max_size=4), _TEXT, st.lists(_TEXT, max_size=3))
def test_a_valid_concept_is_unchanged_after_a_round_trip(prompts, anchor, neighbours):
    try:
        found = parse_target({**CONCEPT, "prompts": prompts, "anchor_prompt": anchor, "neighbours": neighbours}, "x")
    except UsageError:
        return
    texts = [*found.prompts, found.anchor_prompt, *found.neighbours]
    assert all(text and text == text.strip() for text in texts)
    assert found.anchor_prompt not in found.prompts
    assert len({*found.prompts, *found.neighbours}) == len(found.prompts) + len(found.neighbours)
    assert parse_target(json.loads(found.model_dump_json()), "x").pseudo_id == found.pseudo_id


def test_redaction_keeps_only_the_number_of_prompts():
    left = redact(ConceptTarget.model_validate({**CONCEPT, "neighbours": ["kite"]}), "0" * 32)
    assert (left.of, left.count, left.hashes, left.salt) == ("concept", 2, [], None)
