// Runs api.video's Node client against the test server. `.ci/api_video_clients` starts it.
//
// SERVER is the server's URL, and API_KEY its key.
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

// The client is CommonJS. Its HTTP client must be the same instance, so that the interceptor sees the client's calls.
const require = createRequire(import.meta.url);
const ApiVideoClient = require("@api.video/nodejs-client");
const axios = require("axios");

const { API_KEY, SERVER } = process.env;
const MIB = 1 << 20;
// The client accepts no smaller chunks.
const chunkSize = 5 * MIB;

/** The last response. The client drops the fields that its schema does not have, such as `sha256`. */
let response;
axios.interceptors.response.use((received) => (response = received));

const folder = mkdtempSync(join(tmpdir(), "api-video-"));
const file = (name, content) => {
  writeFileSync(join(folder, name), content);
  return join(folder, name);
};
const small = Buffer.from("a small video");
const content = randomBytes(12 * MIB);
const smallFile = file("small.mp4", small);
const contentFile = file("content.mp4", content);
const parts = [0, 5, 10].map((first, at) => file(`part${at}.mp4`, content.subarray(first * MIB, (first + 5) * MIB)));

/** Checks the response to an upload, whose last request had `size` bytes. */
const checkUpload = (expected, size) => {
  assert.equal(response.status, 201);
  assert.equal(response.data.bytes, size);
  assert.equal(response.data.sha256, createHash("sha256").update(expected).digest("hex"));
};

/** Checks the problem document of a call that must fail. */
const fails = async (call, status, name = "") => {
  await assert.rejects(call, ({ code, problemDetails }) => {
    assert.equal(code, status);
    assert.equal(problemDetails.status, status);
    assert.equal(problemDetails.name, name);
    assert.ok(problemDetails.type && problemDetails.title);
    return true;
  });
};

const run = async () => {
  const client = new ApiVideoClient({ apiKey: API_KEY, baseUri: SERVER, chunkSize });
  const { videos } = client;

  // A wrong key.
  const wrong = new ApiVideoClient({ apiKey: "wrong", baseUri: SERVER });
  await assert.rejects(wrong.getAccessToken(), (error) => {
    assert.equal(error.response.data.title, "The user credentials were incorrect.");
    return error.response.status === 400;
  });
  await fails(wrong.videos.list(), 401);

  // Connect. The client does not use the token: it sends the key with each request.
  const token = await client.getAccessToken();
  assert.ok(token.accessToken && token.refreshToken && token.expiresIn > 0);
  assert.equal(token.tokenType, "Bearer");
  assert.deepEqual((await videos.list()).data, []);
  assert.equal(response.config.headers.Authorization, `Basic ${btoa(`${API_KEY}:`)}`);

  // Create.
  const metadata = [{ key: "author", value: "someone" }];
  const given = { title: "a film", description: "d", tags: ["x", "y z"] };
  const video = await videos.create({ ...given, _public: false, metadata });
  assert.equal(response.status, 201);
  const { videoId } = video;
  assert.deepEqual([video.title, video.description, video.tags], ["a film", "d", ["x", "y z"]]);
  assert.deepEqual([video._public, video.panoramic, video.mp4Support], [false, false, true]);
  assert.deepEqual(video.metadata.map((entry) => ({ ...entry })), metadata);
  assert.equal(video.source.uri, `/videos/${videoId}/source`);
  for (const date of [video.createdAt, video.publishedAt, video.updatedAt]) {
    assert.ok(Math.abs(date - Date.now()) < 60_000, String(date));
  }
  for (const asset of ["player", "hls", "thumbnail", "mp4"]) assert.ok(video.assets[asset].startsWith(SERVER), asset);
  assert.deepEqual((await videos.getStatus(videoId)).ingest.receivedBytes, []);
  await fails(videos.create({}), 400, "title");

  // Upload whole, in three chunks, and without the number of parts.
  assert.equal((await videos.upload(videoId, smallFile)).videoId, videoId);
  checkUpload(small, small.length);
  let { ingest } = await videos.getStatus(videoId);
  assert.deepEqual([ingest.status, ingest.filesize], ["uploaded", small.length]);
  const checkParts = async (id) => {
    const { ingest, encoding } = await videos.getStatus(id);
    assert.deepEqual([ingest.status, ingest.filesize, encoding.playable], ["uploaded", content.length, false]);
    assert.deepEqual({ ...ingest.receivedParts }, { parts: [1, 2, 3], total: 3 });
  };
  const chunked = await videos.create({ title: "chunks" });
  await videos.upload(chunked.videoId, contentFile);
  checkUpload(content, 2 * MIB);
  await checkParts(chunked.videoId);
  const progressive = await videos.create({ title: "progressive" });
  let session = videos.createUploadProgressiveSession(progressive.videoId);
  for (const part of parts.slice(0, 2)) {
    assert.equal((await session.uploadPart(part)).videoId, progressive.videoId);
    assert.equal((await videos.getStatus(progressive.videoId)).ingest.status, "uploading");
  }
  await session.uploadLastPart(parts[2]);
  checkUpload(content, 2 * MIB);
  await checkParts(progressive.videoId);

  // List.
  const titles = (page) => page.data.map(({ title }) => title);
  const query = { sortBy: "title", sortOrder: "desc", pageSize: 2 };
  let page = await videos.list({ ...query, currentPage: 1 });
  assert.deepEqual(titles(page), ["progressive", "chunks"]);
  const { itemsTotal, pagesTotal, currentPageItems, links } = page.pagination;
  assert.deepEqual([itemsTotal, pagesTotal, currentPageItems], [3, 2, 2]);
  assert.deepEqual(links.map(({ rel }) => rel), ["self", "first", "next", "last"]);
  page = await videos.list({ ...query, currentPage: 2 });
  assert.deepEqual(titles(page), ["a film"]);
  for (const filter of [{ title: "film" }, { tags: ["x", "y z"] }, { metadata: { author: "someone" } }]) {
    assert.deepEqual((await videos.list(filter)).data.map((found) => found.videoId), [videoId]);
  }
  await fails(videos.list({ pageSize: 101 }), 400, "pageSize");

  // Delegated uploads.
  const upload = await client.uploadTokens.createToken({ ttl: 600 });
  assert.deepEqual([upload.ttl, upload.expiresAt - upload.createdAt], [600, 600_000]);
  assert.equal((await client.uploadTokens.createToken({})).expiresAt, undefined);
  // A delegated upload needs no key.
  const browser = new ApiVideoClient({ baseUri: SERVER, chunkSize });
  assert.equal((await browser.videos.uploadWithUploadToken(upload.token, smallFile)).title, "small.mp4");
  checkUpload(small, small.length);
  session = browser.videos.createUploadWithUploadTokenProgressiveSession(upload.token);
  const first = await session.uploadPart(parts[0]);
  assert.equal((await session.uploadPart(parts[1])).videoId, first.videoId);
  assert.equal((await session.uploadLastPart(parts[2])).videoId, first.videoId);
  checkUpload(content, 2 * MIB);
  const before = (await videos.list()).pagination.itemsTotal;
  assert.equal(before, 5);
  // The client does not send the ID of the first response, so each of the three chunks begins a video.
  await browser.videos.uploadWithUploadToken(upload.token, contentFile);
  assert.equal((await videos.list()).pagination.itemsTotal, before + 3);
  await fails(browser.videos.uploadWithUploadToken("wrong", smallFile), 401);

  // Get and delete.
  assert.equal((await videos.get(videoId)).title, "a film");
  await videos.delete(videoId);
  assert.equal(response.status, 204);
  for (const call of ["get", "getStatus", "delete"]) await fails(videos[call](videoId), 404, "videoId");

  for (const { videoId } of (await videos.list({ pageSize: 100 })).data) await videos.delete(videoId);
  assert.deepEqual((await videos.list()).data, []);
};

try {
  await run();
  console.log("api.video's Node client: all calls succeed");
} finally {
  rmSync(folder, { recursive: true });
}
