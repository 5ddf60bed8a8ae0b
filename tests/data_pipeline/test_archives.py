"""Archives that mean harm: what leads out of them, what is no file, and what fills the memory."""

import gzip
import io
import json
import tarfile
import tracemalloc
import zipfile

import pytest

from data_pipeline.readers import archives
from data_pipeline.readers.archives import members
from data_pipeline.readers.exports import EXPORT, records
from data_pipeline.readers.streams import DamageError
from data_pipeline.sources.base import SourceError
from data_pipeline.sources.sdists import package_headers

FAR = 2**31


def tar_of(*infos: tarfile.TarInfo, content: bytes = b"text") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for info in infos:
            info.size = len(content) if info.isfile() else 0
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_and_devices_are_no_files(tmp_path):
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    infos = [member(f"{kind!r}.md", kind, "/etc/passwd") for kind in kinds]
    (tmp_path / "x.tar").write_bytes(tar_of(*infos, member("good.md")))
    assert [(one.path, one.read()) for one in members(tmp_path / "x.tar")] == [("good.md", b"text")]
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


def test_a_link_in_a_zip_archive_is_its_own_text(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        link = zipfile.ZipInfo("link.md")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert [one.read() for one in members(tmp_path / "x.zip")] == [b"/etc/passwd"]


@pytest.mark.parametrize("name", ["../x.md", "/x.md", "a/../../x.md", "..\\x.md", "C:x.md", "\\\\host\\x.md"])
def test_names_that_lead_out_are_known(tmp_path, name):
    (tmp_path / "x.tar").write_bytes(tar_of(member(name)))
    (found,) = members(tmp_path / "x.tar")
    assert found.climbs


def bomb(kind: bytes) -> bytes:
    """A header that announces two gigabytes of name, packed to two megabytes: zeros."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, FAR
    head = info.tobuf(tarfile.GNU_FORMAT)[-tarfile.BLOCKSIZE :]
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as stream:
        stream.write(head)
        for _ in range(64):  # more than any memory that is granted here, less than the time it takes
            stream.write(bytes(2**20))
    return out.getvalue()


@pytest.mark.parametrize(
    "kind",
    [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.SOLARIS_XHDTYPE],
)
def test_a_name_that_would_fill_the_memory_is_damage(tmp_path, kind):
    (tmp_path / "x.tar.gz").write_bytes(bomb(kind))
    tracemalloc.start()
    with pytest.raises(DamageError, match="a header of 2,147,483,648 bytes"):
        list(members(tmp_path / "x.tar.gz"))
    with pytest.raises(SourceError, match="is damaged"):
        package_headers(tmp_path / "x.tar.gz")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_long_names_as_they_are_written_are_read(tmp_path):
    names = ["a" * 300 + ".md", "ä" * 200 + ".md"]
    for file_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=file_format) as archive:
            for name in names:
                archive.addfile(member(name), io.BytesIO())
        assert [one.path for one in members(tmp_path / "x.tar")] == names


def test_an_export_that_unpacks_to_more_than_it_may_is_damage(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(EXPORT, json.dumps([{}]) + " " * 2**22)
    assert list(records(tmp_path / "x.zip")) == [{}]
    monkeypatch.setattr(archives, "LEAST_ALLOWED", 2**20)
    with pytest.raises(DamageError, match="unpacks to more than an archive of its size may"):
        list(records(tmp_path / "x.zip"))
