// Tests the page of `examples/axum_gateway.rs` in headless Chromium, and takes its picture.
//
//   npm install --prefix /tmp/browser playwright-core
//   cargo run --example axum_gateway -- 8080 &
//   NODE_PATH=/tmp/browser/node_modules node interop/browser/gateway.mjs http://127.0.0.1:8080/ examples/axum_gateway.png
import { createHash } from "node:crypto";
import { createRequire } from "node:module";
import assert from "node:assert/strict";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const [url, picture] = process.argv.slice(2);
const quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: quiet });
try {
  const page = await browser.newPage({ viewport: { width: 760, height: 480 }, colorScheme: "light" });
  const [requests, statuses, problems] = [[], [], []];
  page.on("request", (request) => requests.push(request.allHeaders()));
  page.on("response", (response) => statuses.push(response.status()));
  page.on("requestfailed", (request) => problems.push(`${request.url()}: ${request.failure().errorText}`));
  page.on("pageerror", (error) => problems.push(String(error)));
  const number = async (id) => Number(await page.locator(`#${id}`).textContent());
  const grows = (id, from) =>
    page.waitForFunction(([id, from]) => Number(document.getElementById(id).textContent) > from, [id, from]);

  // Starts the upload of a file. Returns a function that waits until it has arrived.
  async function upload(title, megabytes) {
    const buffer = Buffer.alloc(megabytes << 20, title);
    await page.getByLabel("Title").fill(title);
    await page.getByLabel("Video file").setInputFiles({ name: "film.mp4", mimeType: "video/mp4", buffer });
    await page.getByRole("button", { name: "Upload" }).click();
    return async () => {
      await page.getByRole("cell", { name: title, exact: true }).waitFor();
      const digest = createHash("sha256").update(buffer).digest("hex").slice(0, 16);
      const message = await page.getByRole("status").textContent();
      assert.equal(message, `${buffer.length.toLocaleString("en")} bytes arrived; SHA-256 ${digest}…`);
    };
  }

  await page.goto(url);
  await grows("generation", 0);
  for (const [title, megabytes] of [["Sunrise", 3], ["The harbour at noon", 20]]) {
    await (await upload(title, megabytes))();
  }

  // All tokens are revoked while a chunk is sent: the browser sends slowly.
  const devtools = await page.context().newCDPSession(page);
  const speed = { offline: false, latency: 0, downloadThroughput: -1, uploadThroughput: 5e6 };
  await devtools.send("Network.emulateNetworkConditions", speed);
  const [generation, challenged] = [await number("generation"), await number("challenged")];
  const arrived = await upload("Night train", 24);
  await page.waitForFunction(() => document.getElementById("progress").value > 0.1);
  await page.getByRole("button", { name: "Revoke all tokens" }).click();
  await grows("challenged", challenged);
  await grows("generation", generation);
  const progress = () => page.locator("#progress").evaluate((bar) => bar.value);
  assert.ok(await progress() < 1, `the gateway has a new token during the upload, got ${await progress()}`);
  await page.waitForTimeout(1500); // Until the numbers have their color again.
  await page.screenshot({ path: picture });
  await arrived();

  // The token is also replaced while the page does nothing.
  await grows("generation", await number("generation"));
  assert.equal(await page.locator("tbody tr").count(), 3);
  assert.equal(await number("seen"), 0);
  assert.deepEqual(problems, []);
  assert.ok(statuses.every((status) => status < 300), `all requests succeed, got ${statuses}`);
  const headers = await Promise.all(requests);
  assert.ok(headers.length >= 10 && headers.every((header) => !("authorization" in header)), "the page has no token");
  console.log(`3 videos uploaded and listed in ${browser.version()}; tokens revoked during one; ` +
    `${await number("challenged")} 401s from the API, none in the page; generation ${await number("generation")}; ` +
    `${headers.length} requests, none with a token`);
} finally {
  await browser.close();
}
