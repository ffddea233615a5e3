// Tests the page of `examples/axum_gateway.rs` in headless Chromium, and takes the screenshot for README.md.
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
  const page = await browser.newPage({ viewport: { width: 760, height: 480 } });
  const headers = [];
  page.on("request", async (request) => headers.push(await request.allHeaders()));
  const problems = [];
  page.on("pageerror", (error) => problems.push(String(error)));

  await page.goto(url);
  for (const [title, megabytes] of [["Sunrise", 3], ["The harbour at noon", 20], ["Night train", 8]]) {
    const buffer = Buffer.alloc(megabytes << 20, title);
    await page.getByLabel("Title").fill(title);
    await page.getByLabel("Video file").setInputFiles({ name: "film.mp4", mimeType: "video/mp4", buffer });
    await page.getByRole("button", { name: "Upload" }).click();
    await page.getByRole("cell", { name: title, exact: true }).waitFor();
    const digest = createHash("sha256").update(buffer).digest("hex").slice(0, 16);
    const message = await page.getByRole("status").textContent();
    assert.equal(message, `${buffer.length.toLocaleString("en")} bytes arrived; SHA-256 ${digest}…`);
  }
  assert.equal(await page.locator("tbody tr").count(), 3);
  assert.deepEqual(problems, []);
  assert.ok(headers.length >= 10 && headers.every((header) => !("authorization" in header)), "the page has no token");
  await page.screenshot({ path: picture });
  console.log(`3 videos uploaded and listed in ${browser.version()}; ${headers.length} requests, none with a token`);
} finally {
  await browser.close();
}
