"""Checkpoints in a store of objects: TensorStore's driver and fsspec on one fake of Google Cloud Storage."""

import io
import json
import posixpath
import urllib.parse

import fsspec
import gcs_server
import pytest
from etils import epath
from test_checkpoint_saving import opened, save, target

from bloomjax import checkpoint_manifest
from bloomjax.checkpoint_folder import CheckpointFolder
from bloomjax.checkpoints import Checkpoints
from bloomjax.errors import BadInput

URL = "gs://bucket/runs/a/checkpoints"


class _Handler(gcs_server._Handler):
    """Lists and deletes, too."""

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        if not url.path.endswith("/o"):
            return super().do_GET()
        prefix = dict(urllib.parse.parse_qsl(url.query)).get("prefix", "")
        names = sorted(name for name in self.server.objects if name.startswith(prefix))
        items = [{"name": name, "size": str(len(self.server.objects[name][0]))} for name in names]
        return self._answer(200, json.dumps({"items": items}).encode())

    def do_DELETE(self):
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path.rsplit("/o/", 1)[-1])
        found = self.server.objects.pop(name, None)
        return self._answer(204 if found else 404)


class _Objects(fsspec.AbstractFileSystem):
    """The objects of the server as gcsfs shows those of a bucket: folders are prefixes."""

    protocol = ("gs", "gcs")
    cachable = False
    objects: dict[str, tuple[bytes, int]] = {}

    def _names(self, path):
        prefix = self._key(path) + "/"
        return [name for name in self.objects if name.startswith(prefix)]

    def _key(self, path):
        return self._strip_protocol(path).partition("/")[2]

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if self._key(path) in self.objects:
            size = len(self.objects[self._key(path)][0])
            return {"name": path, "type": "file", "size": size, "mtime": 0}
        if self._names(path) or "/" not in path:
            return {"name": path, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if self._key(path) in self.objects:
            return [self.info(path)] if detail else [path]
        start = len(self._key(path)) + 1
        below = {name[start:].partition("/")[0] for name in self._names(path)}
        if not below:
            raise FileNotFoundError(path)
        found = [posixpath.join(path, name) for name in sorted(below)]
        return [self.info(each) for each in found] if detail else found

    def _open(self, path, mode="rb", **_):
        key = self._key(path)
        if mode == "rb":
            if key not in self.objects:
                raise FileNotFoundError(path)
            return io.BytesIO(self.objects[key][0])
        return _Upload(self.objects, key)

    def rm(self, path, recursive=False, maxdepth=None):
        del maxdepth
        names = self._names(path) if recursive else []
        for name in names or [self._key(path)]:
            if self.objects.pop(name, None) is None:
                raise FileNotFoundError(path)

    def cp_file(self, path1, path2, **_):
        if self._key(path1) in self.objects:
            self.objects[self._key(path2)] = self.objects[self._key(path1)]

    def makedirs(self, path, exist_ok=False):
        pass

    def mkdir(self, path, create_parents=True, **_):
        pass

    def rmdir(self, path):
        pass


class _Upload(io.BytesIO):
    def __init__(self, objects, key):
        super().__init__()
        self._objects, self._key = objects, key

    def close(self):
        if not self.closed:
            generation = self._objects.get(self._key, (b"", 0))[1] + 1
            self._objects[self._key] = self.getvalue(), generation
        super().close()


@pytest.fixture(scope="module")
def server():
    found = gcs_server.Server()
    found.RequestHandlerClass = _Handler
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, _Objects, clobber=True)
    yield found
    found.shutdown()


@pytest.fixture
def objects(server):
    server.objects.clear()
    _Objects.objects = server.objects
    return server.objects


def test_a_run_with_a_url(objects, tmp_path):
    first = opened(tmp_path, directory=URL, keep_last=2)
    save(first, 10, 20, 30)
    first.wait()
    assert first.steps() == [20, 30] and not list(tmp_path.iterdir())
    first.pin(20, "incident")
    first.close()
    assert not [name for name in objects if name.startswith("runs/a/checkpoints/10/")]
    second = opened(tmp_path, directory=URL, keep_last=2)
    assert second.restore(target(), lambda p: None)[1]["step"] == 30
    assert second.put_aside_from(30) == [30] and second.steps() == [20]
    assert second.restore(target(), lambda p: None)[1]["step"] == 20
    save(second, 30)
    second.wait()
    assert second.steps() == [20, 30] and second.wants_retry() is False
    second.close()


def test_what_has_no_manifest_is_no_checkpoint(objects, tmp_path):
    checkpoints = opened(tmp_path, directory=URL)
    save(checkpoints, 10, 20)
    checkpoints.close()
    del objects[f"runs/a/checkpoints/20/{checkpoint_manifest.NAME}"]  # killed before its last file
    checkpoints = opened(tmp_path, directory=URL)
    assert checkpoints.steps() == [10]
    assert checkpoints.restore(target(), lambda p: None)[1]["step"] == 10
    assert not [name for name in objects if "/20/" in name]  # a leftover
    checkpoints.close()


def test_damage(objects, tmp_path):
    checkpoints = opened(tmp_path, directory=URL)
    save(checkpoints, 10, 20)
    checkpoints.close()
    name = max((n for n in objects if "/20/state/" in n), key=lambda n: len(objects[n][0]))
    data = bytearray(objects[name][0])
    data[len(data) // 2] ^= 1
    objects[name] = bytes(data), 99
    checkpoints = opened(tmp_path, directory=URL)
    assert checkpoints.restore(target(), lambda p: None)[1]["step"] == 10
    assert name.partition("/20/")[2] in checkpoints.problems[0]
    checkpoints.close()
    folder = CheckpointFolder(URL)
    assert [path.name for path in folder.put_asides("damaged-")] == ["damaged-20"]
    assert folder.free_bytes() is None and isinstance(folder.path, epath.Path)


def test_what_orbax_cannot_do(tmp_path):
    with pytest.raises(BadInput, match="s3://"):
        Checkpoints(save_every_steps=1, directory="s3://bucket/a").open(tmp_path)
