"""A stand-in of the model hub on the loopback: what huggingface_hub asks of it, and no more.

``hub.models`` holds by name its commits, oldest first, each {file: bytes}. What it shall refuse is set on it.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.models, self.objects, self.tokens = {}, {}, {"good"}
        self.private = set()  # names that nobody sees without a token
        self.cut_after = None  # bytes of a file after which the connection breaks
        self.status = None  # answer everything so
        self.asked = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


def commit_of(number):
    return hashlib.sha1(str(number).encode()).hexdigest()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self, name=None):
        """Whether the answer was no: a status for all, an unknown token, a model that is not there."""
        hub, given = self.server, (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        hub.asked.append(f"{self.command} {self.path}")
        if hub.status:
            self.answer(hub.status, X_Error_Message="not today")
        elif given and given not in hub.tokens:
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif name is not None and (name not in hub.models or (name in hub.private and not given)):
            self.answer(404 if given else 401, X_Error_Code="RepoNotFound")
        else:
            return False
        return True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path)
        if found is None or self.refused(found[1]):
            return found or self.answer(404)
        name, revision, file = found.groups()
        commits = self.server.models[name]
        known = {commit_of(number): number for number in range(len(commits))} | {"main": len(commits) - 1}
        if revision not in known:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        number = known[revision]
        if file not in commits[number]:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit_of(number))
        body = commits[number][file]
        told = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": commit_of(number)}
        cut = self.server.cut_after
        if self.command == "GET" and cut is not None and len(body) > cut:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.close()
        return self.answer(200, body, **told)

    def do_POST(self):
        hub = self.server
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            if self.refused():
                return None
            if not self.headers.get("Authorization"):
                return self.answer(401, X_Error_Message="Invalid username or password.")
            told = json.loads(text)
            name = f"{told.get('organization', 'user')}/{told['name']}"
            hub.models.setdefault(name, [{}])
            if told.get("private") or told.get("visibility") == "private":
                hub.private.add(name)
            return self.answer(200, {"url": f"{hub.address}/{name}"})
        name = re.search(
            r"([\w-]+/[\w.-]+?)(/preupload|/commit|\.git/)", self.path.replace("/api/models", "")
        )[1]
        if self.refused(name):
            return None
        if "/preupload/" in self.path:
            files = json.loads(text)["files"]
            kind = {True: "lfs", False: "regular"}
            told = [
                {
                    "path": one["path"],
                    "uploadMode": kind[one["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for one in files
            ]
            return self.answer(200, {"files": told})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/store/{one['oid']}"}}}
                for one in json.loads(text)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        files = dict(hub.models[name][-1])
        for line in map(json.loads, text.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
        hub.models[name].append(files)
        commit = commit_of(len(hub.models[name]) - 1)
        url = f"{hub.address}/{name}/commit/{commit}"
        return self.answer(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def do_PUT(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.chunks()
        self.server.objects[self.path.rpartition("/")[2]] = body
        return self.answer(200)

    def chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)
