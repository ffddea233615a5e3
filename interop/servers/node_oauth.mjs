// An authorization server (@node-oauth/oauth2-server) whose refresh tokens rotate, for foreign_servers.
//
//   node node_oauth.mjs port folder lifetime
//
// Listens on loopback, and ends when its standard input closes. What it knows is in the folder.
import { createServer } from "node:http";

import OAuth2Server from "@node-oauth/oauth2-server";

import { Saved } from "./saved.mjs";

const [port, folder, lifetime] = process.argv.slice(2);
const tokens = new Saved(folder);
const app = { id: "app", grants: ["password", "refresh_token"] };
const user = { name: "user" };

const oauth = new OAuth2Server({
  model: {
    getClient: (id, secret) => id === "app" && secret === "secret" && app,
    getUser: (name, password) => name === "user" && password === "password" && user,
    saveToken: (token, client, owner) => {
      tokens.set(token.refreshToken, { ...token, client, user: owner });
      return { ...token, client, user: owner };
    },
    getRefreshToken: (refreshToken) => tokens.get(refreshToken),
    revokeToken: ({ refreshToken }) => tokens.delete(refreshToken),
  },
  accessTokenLifetime: Number(lifetime),
  alwaysIssueNewRefreshToken: true,
});

createServer(async (incoming, outgoing) => {
  const chunks = await incoming.toArray();
  const { headers, method, url } = incoming;
  const body = Object.fromEntries(new URLSearchParams(Buffer.concat(chunks).toString()));
  const response = new OAuth2Server.Response();
  try {
    const { pathname, searchParams } = new URL(url, "http://localhost");
    if (pathname !== "/token") throw Object.assign(new Error("not found"), { code: 404 });
    await oauth.token(new OAuth2Server.Request({ headers, method, query: Object.fromEntries(searchParams), body }), response);
  } catch (error) {
    response.status = error.code ?? 500;
    response.body ??= { error: error.name };
  }
  outgoing.writeHead(response.status, { ...response.headers, "Content-Type": "application/json" });
  outgoing.end(JSON.stringify(response.body));
}).listen(Number(port), "127.0.0.1");
process.stdin.on("end", () => process.exit()).resume();
