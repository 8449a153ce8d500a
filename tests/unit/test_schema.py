"""Bounds on JSON schemas: what engines choke on is refused before they see it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.dialects.openai.schema import (
    ALTERNATIVES_MAX,
    BYTES_MAX,
    DEPTH_MAX,
    NODES_MAX,
    PATTERN_CHARS_MAX,
    REPEAT_MAX,
    check_schema,
    most_repeats,
)
from forebay.errors import InvalidRequest


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(DEPTH_MAX),
        {"enum": ["x"] * ALTERNATIVES_MAX},
        {"maxItems": REPEAT_MAX, "minItems": REPEAT_MAX},
        {"pattern": "a" * PATTERN_CHARS_MAX},
        {"pattern": "(a{10}){100}"},
        {"minimum": 3, "maximum": 3},
        {"$ref": "#/$defs/x"},
        {"properties": {"pattern": {"type": "string"}, "enum": {"type": "string"}}},
    ],
)
def test_a_schema_at_the_bounds_passes(schema: dict[str, Any]) -> None:
    check_schema(schema, "p")


@pytest.mark.parametrize(
    "schema",
    [
        nested(DEPTH_MAX + 1),
        {"enum": ["x"] * (ALTERNATIVES_MAX + 1)},
        {"anyOf": [{"enum": ["x"] * 300}, {"enum": ["x"] * 300}]},
        {"properties": {f"p{number}": {} for number in range(ALTERNATIVES_MAX + 1)}},
        {"description": "x" * BYTES_MAX},
        {"x": [{}] * NODES_MAX},
        {"maxItems": REPEAT_MAX + 1},
        {"minLength": 1e300},
        {"minLength": 2, "maxLength": 1},
        {"items": {"minItems": 2, "maxItems": 1}},
        {"minimum": 1.5, "maximum": 1},
        {"pattern": "a" * (PATTERN_CHARS_MAX + 1)},
        {"pattern": "(a{40}){40}"},
        {"pattern": "a{999999999}"},
        {"$ref": "http://x"},
        {"$ref": "other.json#/x"},
    ],
)
def test_a_schema_beyond_a_bound_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_schema({"properties": {"a": schema}} if len(str(schema)) < 200 else schema, "the.param")
    assert refused.value.param == "the.param"


@pytest.mark.parametrize(
    ("pattern", "repeats"),
    [
        *(("", 1), ("abc", 1), ("a+b*c?", 1), ("a{5}", 5), ("a{2,7}", 7), ("a{3,}", 3), ("a{5}b{9}", 9)),
        *(("(a{2}b{3}){4}", 12), ("((a{5}))c{3}", 5), ("a{2}{3}", 6), ("((a{0,99}){0,99}){0,99}", 99**3)),
        *(
            ("[{9}]", 1),
            (r"[\]{9}]", 1),
            ("[ab]{9}", 9),
            (r"\({9}", 9),
            (r"\\{9}", 9),
            ("a{", 1),
            ("a{}", 1),
            ("){4}", 4),
        ),
    ],
)
def test_nested_repeats_multiply(pattern: str, repeats: int) -> None:
    assert most_repeats(pattern) == repeats


@given(st.text(alphabet="ab(){},0123[]\\|+*?^$", max_size=PATTERN_CHARS_MAX))
def test_no_pattern_is_too_odd_to_count(pattern: str) -> None:
    assert most_repeats(pattern) >= 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["type", "enum", "anyOf", "properties", "pattern", "minItems", "maxItems", "$ref", "items"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=20,
    )
)
def test_no_schema_is_too_odd_to_check(schema: Any) -> None:
    try:
        check_schema({"x": schema}, "p")
    except InvalidRequest:
        return
