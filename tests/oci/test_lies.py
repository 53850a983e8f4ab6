"""Answers that are wrong about a blob: an error in time, and the truth once it is told."""

from __future__ import annotations

import pytest

from mfs.errors import IntegrityError, MfsError
from mfs.sources import open_source
from mfs.testing import ramp
from mfs.testing.suite import deadline, list_tree, object_of, read
from tests.oci import static
from tests.servers.liar import LiarServer, Lie

CONTENT = ramp((9 << 20) + 5)
"""More than a server that does no ranges is forgiven."""

NOT_SEEN = {Lie.WRONG_BYTES, Lie.IGNORES_IF_MATCH, Lie.CHANGED}
"""Other bytes in an answer that is right in all else: no range of a layer tells, `mfs verify` of the whole does
(tests/mount/test_oci.py)."""
HARMLESS = {Lie.NEW_ETAGS, Lie.NO_ETAG, Lie.TRUNCATED}
"""A blob is named by what it holds; nothing is made of ETags. A range that breaks off is read on from there."""


@pytest.mark.parametrize("lie", [lie for lie in Lie if lie not in NOT_SEEN])
def test_a_lie_is_an_error_in_time(liar: LiarServer, lie: Lie) -> None:
    place = static.publish(liar.files, "team/m", {"v1": {"w.bin": CONTENT}})["v1/w.bin"]
    source = open_source(f"oci+{liar.url}team/m:v1")
    obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
    assert read(source, obj, 5000, 6000) == CONTENT[5000:6000]
    liar.lie(lie, pattern=place, after_bytes=300, interval_s=0.05)
    if lie in HARMLESS:
        assert read(source, obj, 5000, 6000) == CONTENT[5000:6000]
    else:
        with pytest.raises(MfsError, match=r"w\.bin") as caught:
            read(source, obj, 5000, 6000, deadline_s=deadline(0.7))
        assert "\n" not in str(caught.value)
    assert liar.lies_told()
    liar.tell_truth()
    assert read(source, obj) == CONTENT
    source.close()


def test_a_manifest_that_is_not_what_was_asked_for(liar: LiarServer) -> None:
    static.publish(liar.files, "team/m", {"v1": {"w.bin": b"1"}})
    digest = f"sha256:{'0' * 64}"
    manifests = liar.files / "v2/team/m/manifests"
    (manifests / digest).write_bytes((manifests / "v1").read_bytes())
    source = open_source(f"oci+{liar.url}team/m@{digest}")
    with pytest.raises(IntegrityError, match=f"expected bytes of the digest {digest}"):
        list(source.list("", deadline_s=deadline(2)))
    source.close()
