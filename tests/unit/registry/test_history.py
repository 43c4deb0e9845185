from salun_core.registry.history import history
from salun_core.registry.holds import VersionDisposal, record_disposal
from salun_core.registry.versions import publish
from salun_core.storage.keys import blob_key
from salun_core.times import utc_now
from tests.support.folder_model import UNET, write_folder


def kept(store):
    return [version.kept for version in history(store, "sd", lambda run: None)]


def test_the_weights_of_a_folder_are_all_its_weight_files(store, tmp_path):
    before, after = write_folder(tmp_path / "before"), write_folder(tmp_path / "after", 4000)
    head, parent = publish(store, {"line": "sd", "method": "train"}, before)
    publish(store, {"line": "sd", "method": "salun", "parent": head.version, "run": "run-1"}, after)
    assert kept(store) == ["whole", "whole"]
    store.delete(blob_key(parent.files[UNET].sha256))  # the VAE is still there: both versions need it
    assert kept(store) == ["whole", "missing"]
    fields = {"line": "sd", "version": head.version, "files": [UNET], "size": 1, "by": "purge", "reason": "superseded"}
    record_disposal(store, VersionDisposal(**fields, at=utc_now()))
    assert kept(store) == ["whole", "purged"]
