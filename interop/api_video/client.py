"""Runs api.video's Python client against the test server. `.ci/api_video_clients` starts it.

SERVER is the server's URL, API_KEY its key, and TOKEN_LIFETIME the lifetime of its tokens in seconds.
"""

import datetime
import hashlib
import json
import os
import random
import tempfile
import time

import urllib3
from apivideo import AuthenticatedApiClient
from apivideo.apis import UploadTokensApi, VideosApi
from apivideo.configuration import Configuration
from apivideo.exceptions import ApiException, NotFoundException, UnauthorizedException
from apivideo.model.metadata import Metadata
from apivideo.model.token_creation_payload import TokenCreationPayload
from apivideo.model.video_creation_payload import VideoCreationPayload

SERVER = os.environ["SERVER"]
MIB = 1 << 20
# The client accepts no smaller chunks.
CHUNK = 5 * MIB
CONTENT = random.Random(16).randbytes(12 * MIB)
PARTS = [CONTENT[first : first + CHUNK] for first in range(0, len(CONTENT), CHUNK)]


def client(key):
    new = AuthenticatedApiClient(key, configuration=Configuration(chunk_size=CHUNK))
    # The constructor sets the production host.
    new.configuration.host = SERVER
    return new


def file_of(content):
    file = tempfile.NamedTemporaryFile(suffix=".mp4")
    file.write(content)
    return file


def failure(status, call, kind=ApiException):
    """Returns the problem document of a call that must fail."""
    try:
        call()
    except kind as error:
        assert error.status == status, error.status
        body = error.body.decode() if isinstance(error.body, bytes) else error.body
        problem = json.loads(body)
        assert problem["status"] == status and problem.keys() >= {"type", "title", "name"}
        return problem
    raise AssertionError(f"{status} expected")


def check_upload(api, content, size):
    """Checks the response to an upload, whose last request had `size` bytes."""
    # The client drops the fields that its schema does not have.
    response = json.loads(api.last_response.data)
    assert api.last_response.status == 201
    assert response["bytes"] == size, response["bytes"]
    assert response["sha256"] == hashlib.sha256(content).hexdigest()


def check_parts(status, content, parts):
    ingest = status.ingest
    assert (ingest.status, ingest.filesize) == ("uploaded", len(content)), ingest
    assert (ingest.received_parts.parts, ingest.received_parts.total) == (list(range(1, parts + 1)), parts)
    assert status.encoding.playable is False


def run(api):
    videos, tokens = VideosApi(api), UploadTokensApi(api)
    assert videos.list().data == []

    # Create.
    metadata = [Metadata(key="author", value="someone")]
    video = videos.create(
        VideoCreationPayload(title="a film", description="d", public=False, tags=["x", "y z"], metadata=metadata)
    )
    assert (video.title, video.description, video.tags) == ("a film", "d", ["x", "y z"])
    assert (video.public, video.panoramic, video.mp4_support) == (False, False, True)
    assert [(entry.key, entry.value) for entry in video.metadata] == [("author", "someone")]
    assert video.source.uri == f"/videos/{video.video_id}/source"
    for date in (video.created_at, video.published_at, video.updated_at):
        assert abs(date - datetime.datetime.now(datetime.timezone.utc)) < datetime.timedelta(minutes=1)
    for url in (video.assets.player, video.assets.hls, video.assets.thumbnail, video.assets.mp4):
        assert url.startswith(SERVER), url
    assert videos.get_status(video.video_id).ingest.received_bytes == []

    # Upload in one chunk, in three, and without the number of parts.
    small = b"a small video"
    assert videos.upload(video.video_id, file_of(small)).video_id == video.video_id
    check_upload(api, small, len(small))
    check_parts(videos.get_status(video.video_id), small, 1)
    chunked = videos.create(VideoCreationPayload(title="chunks"))
    progress = []
    # The client accepts a function, not a method of a list.
    videos.upload(chunked.video_id, file_of(CONTENT), _progress_listener=lambda *at: progress.append(at))
    check_upload(api, CONTENT, len(PARTS[-1]))
    assert progress == [(end * MIB, 12 * MIB) for end in (5, 10, 12)], progress
    check_parts(videos.get_status(chunked.video_id), CONTENT, 3)
    progressive = videos.create(VideoCreationPayload(title="progressive"))
    session = videos.create_upload_progressive_session(progressive.video_id)
    for part in PARTS[:-1]:
        assert session.uploadPart(file_of(part)).video_id == progressive.video_id
        assert videos.get_status(progressive.video_id).ingest.status == "uploading"
    session.uploadLastPart(file_of(PARTS[-1]))
    check_upload(api, CONTENT, len(PARTS[-1]))
    check_parts(videos.get_status(progressive.video_id), CONTENT, 3)

    # List.
    page = videos.list(sort_by="title", sort_order="desc", current_page=1, page_size=2)
    assert [video.title for video in page.data] == ["progressive", "chunks"]
    pagination = page.pagination
    assert (pagination.items_total, pagination.pages_total, pagination.current_page_items) == (3, 2, 2)
    assert [link.rel for link in pagination.links] == ["self", "first", "next", "last"]
    page = videos.list(sort_by="title", sort_order="desc", current_page=2, page_size=2)
    assert [video.title for video in page.data] == ["a film"]
    for filters in ({"title": "film"}, {"tags": ["x", "y z"]}, {"metadata": {"author": "someone"}}):
        assert [found.video_id for found in videos.list(**filters).data] == [video.video_id], filters
    assert failure(400, lambda: videos.list(page_size=101))["name"] == "pageSize"

    # Delegated uploads.
    token = tokens.create_token(TokenCreationPayload(ttl=600))
    assert (token.ttl, token.expires_at - token.created_at) == (600, datetime.timedelta(minutes=10))
    assert "expires_at" not in tokens.create_token(TokenCreationPayload())
    videos.upload_with_upload_token(token.token, file_of(small))
    check_upload(api, small, len(small))
    session = videos.create_upload_with_upload_token_progressive_session(token.token)
    first = session.uploadPart(file_of(PARTS[0]))
    assert session.uploadPart(file_of(PARTS[1])).video_id == first.video_id
    last = session.uploadLastPart(file_of(PARTS[2]))
    assert last.video_id == first.video_id
    check_upload(api, CONTENT, len(PARTS[2]))
    before = videos.list().pagination.items_total
    assert before == 5
    # The client does not send the ID of the first response, so each of the three chunks begins a video.
    videos.upload_with_upload_token(token.token, file_of(CONTENT))
    assert videos.list().pagination.items_total == before + 3
    failure(401, lambda: videos.upload_with_upload_token("wrong", file_of(small)), UnauthorizedException)

    # Get and delete.
    assert videos.get(video.video_id).title == "a film"
    videos.delete(video.video_id)
    for call in (videos.get, videos.get_status, videos.delete):
        assert failure(404, lambda: call(video.video_id), NotFoundException)["name"] == "videoId"


def check_refresh(api, first_token):
    """The first token expires, and the client has replaced it by itself."""
    deadline = time.monotonic() + float(os.environ["TOKEN_LIFETIME"]) + 10
    headers = {"Authorization": f"Bearer {first_token}"}
    while urllib3.request("GET", f"{SERVER}/videos", headers=headers).status != 401:
        assert time.monotonic() < deadline, "the first token does not expire"
        time.sleep(0.2)
    assert api._access_token != first_token
    VideosApi(api).list()

    # Nothing renews a token that is rejected: a client whose thread has ended stays without a valid one.
    stale = client(os.environ["API_KEY"])
    stale._access_token = first_token
    for _ in range(2):
        failure(401, VideosApi(stale).list, UnauthorizedException)


def main():
    title = "The user credentials were incorrect."
    assert failure(400, client("wrong").connect)["title"] == title
    with client(os.environ["API_KEY"]) as api:
        first_token = api._access_token
        run(api)
        check_refresh(api, first_token)
        videos = VideosApi(api)
        for video in videos.list(page_size=100).data:
            videos.delete(video.video_id)
        assert videos.list().data == []
    print("api.video's Python client: all calls succeed")


if __name__ == "__main__":
    main()
