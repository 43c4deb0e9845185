"""Pipelines are built without the source of each caller, and errors of kfp still name the setter."""

import inspect

import pytest
from kfp import dsl

from pipelines.callers import without_source_lines


def test_frames_have_the_names_and_lines_of_the_standard_library():
    whole = inspect.stack()
    with without_source_lines():
        short = inspect.stack()
    assert [(item.filename, item.function) for item in short] == [(item.filename, item.function) for item in whole]
    assert [item.lineno for item in short[1:]] == [item.lineno for item in whole[1:]]
    assert {item.code_context for item in short} == {None}


def test_the_error_of_a_setter_names_it_and_the_standard_library_is_restored():
    original = inspect.stack

    def outer():
        dsl.importer(artifact_uri="s3://bucket/file", artifact_class=dsl.Artifact).set_cpu_limit("1")

    with pytest.raises(ValueError, match="set_cpu_limit can only be used"), without_source_lines():
        dsl.pipeline(outer)
    assert inspect.stack is original
