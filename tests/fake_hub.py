"""A model hub on the loopback interface: as much of the hub's HTTP interface as `huggingface_hub` needs to check a
card, make a repository, send a folder and get it back. Every file travels in the commit itself, none by LFS."""

import base64, hashlib, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class FakeHub:
    """Use it as a context manager. `url` goes to HF_ENDPOINT. `repos` holds what was pushed: (kind, OWNER/NAME) to
    visibility, files and commit. `seen` holds method and path of each request."""

    def __enter__(self):
        self.repos, self.seen = {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *a):
                pass

            def handle_any(self):
                n = int(self.headers.get("Content-Length") or 0)
                path = unquote(urlparse(self.path).path)
                hub.seen.append(f"{self.command} {path}")
                status, headers, body = hub.answer(self.command, path, self.rfile.read(n))
                self.send_response(status)
                for k, v in (headers | {"Content-Length": len(body)}).items():
                    self.send_header(k, str(v))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_POST = do_HEAD = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *a):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method, path, body):
        "(status, headers, body) of a request."
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "validate-yaml"]:
            return self.json(errors=[], warnings=[])
        if parts[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if parts[0] == "api" and len(parts) > 4 and parts[4] in ("preupload", "commit", "revision", "tree"):
            key = (parts[1].removesuffix("s"), "/".join(parts[2:4]))
            if key in self.repos:
                return getattr(self, parts[4])(self.repos[key], key, body)
        elif "resolve" in parts:
            kind = "dataset" if parts[0] == "datasets" else "model"
            owner, name, _, _, *file = parts[kind == "dataset" :]
            return self.file(self.repos.get((kind, f"{owner}/{name}")), "/".join(file))
        return self.json(404, error="not found")

    def json(self, status=200, **values):
        return status, {"Content-Type": "application/json"}, json.dumps(values).encode()

    def create(self, asked):
        repo, kind = f"{asked['organization']}/{asked['name']}", asked.get("type") or "model"
        url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        if (kind, repo) in self.repos:
            return self.json(409, error="You already created this repo", url=url)
        self.repos[kind, repo] = dict(visibility=asked.get("visibility"), files={}, commit="0" * 40)
        return self.json(url=url)

    def preupload(self, repo, key, body):
        names = [f["path"] for f in json.loads(body)["files"]]
        return self.json(files=[dict(path=n, uploadMode="regular", shouldIgnore=False) for n in names])

    def commit(self, repo, key, body):
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repo["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        repo["commit"] = hashlib.sha1(body).hexdigest()
        return self.json(commitUrl=f"{self.url}/{key[1]}/commit/{repo['commit']}", commitOid=repo["commit"])

    def revision(self, repo, key, body):
        files = [dict(rfilename=name) for name in repo["files"]]
        return self.json(id=key[1], sha=repo["commit"], siblings=files, private=False, tags=[], downloads=0)

    def tree(self, repo, key, body):
        oids = {name: hashlib.sha1(data).hexdigest() for name, data in repo["files"].items()}
        files = [dict(type="file", path=n, oid=oids[n], size=len(d)) for n, d in repo["files"].items()]
        return 200, {"Content-Type": "application/json"}, json.dumps(files).encode()

    def file(self, repo, name):
        if repo is None or name not in repo["files"]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = repo["files"][name]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": repo["commit"], "Accept-Ranges": "bytes"}, data
