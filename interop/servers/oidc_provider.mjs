// An authorization server (oidc-provider) and an API that checks its tokens, for tests/oauth2.rs and foreign_servers.
//
//   node oidc_provider.mjs [port [folder [lifetime [grace]]]]
//
// Listens on loopback, prints {"port": number} on a line, and ends when its standard input closes. What it knows is in
// the folder, if there is one, and in memory. Lifetime and grace are those of `settings`, in seconds. The routes beneath
// /test/ control it: they stand for logins, revocations and slow networks.
import { generateKeyPairSync, randomUUID } from "node:crypto";
import { once } from "node:events";
import { createServer } from "node:http";

import Provider from "oidc-provider";
// The package exports no adapter. Tokens are kept as its own in-memory adapter keeps them, with a grace added.
import MemoryAdapter, { setStorage } from "./node_modules/oidc-provider/lib/adapters/memory_adapter.js";

import { Saved } from "./saved.mjs";

const [portToUse = "0", folder, lifetime = "3600", grace = "0"] = process.argv.slice(2);
const server = createServer();
server.listen(Number(portToUse), "127.0.0.1");
await once(server, "listening");
const { port } = server.address();

/** What a test may set: the access tokens' lifetime in seconds, a used refresh token's grace in milliseconds. */
const settings = { lifetime: Number(lifetime), grace: Number(grace) * 1000, rfc8414: true };

const counts = { token: {}, api: {}, metadata: {} };
const count = (route, name) => { counts[route][name] = (counts[route][name] ?? 0) + 1; };

const saved = new Saved(folder);
setStorage(saved);

/** With a grace, a used refresh token still counts as unused until the grace has passed since its first use. */
class Adapter extends MemoryAdapter {
  async consume(id) {
    const found = await super.find(id);
    found.usedAt ??= Date.now();
    await super.consume(id);
    saved.save();
  }

  async find(id) {
    const found = await super.find(id);
    return Date.now() < found?.usedAt + settings.grace ? { ...found, consumed: undefined } : found;
  }
}

const client = (client_id, token_endpoint_auth_method, ...grant_types) => ({
  client_id, token_endpoint_auth_method, grant_types, redirect_uris: [], response_types: [],
});
// Each of these characters must be form-encoded before it goes into Basic (RFC 6749 §2.3.1).
const client_secret = "100%+a:b c%2Bd/e=&";
const scopes = ["offline_access", "read", "write", "admin"];
const day = 24 * 60 * 60;

const provider = new Provider(`http://127.0.0.1:${port}`, {
  adapter: Adapter,
  clients: [
    { ...client("a client: 1%+", "client_secret_basic", "client_credentials", "refresh_token"), client_secret },
    { ...client("poster", "client_secret_post", "client_credentials"), client_secret },
    client("app", "none", "refresh_token"),
  ],
  scopes,
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_, audience) => ({ audience, scope: scopes.join(" "), accessTokenFormat: "opaque" }),
    },
  },
  cookies: { keys: [randomUUID()] },
  findAccount: (_, accountId) => ({ accountId, claims: () => ({ sub: accountId }) }),
  rotateRefreshToken: true,
  ttl: {
    AccessToken: () => settings.lifetime,
    ClientCredentials: () => settings.lifetime,
    Grant: day,
    RefreshToken: day,
  },
});

provider.on("grant.success", ({ oidc }) => count("token", oidc.params.grant_type));
provider.on("grant.error", ({ oidc }, error) => {
  count("token", `${oidc.params?.grant_type} ${error.error}`);
  if (error.error_detail === "refresh token already used") count("token", "reuse");
});
provider.on("grant.revoked", () => count("token", "revoked family"));

const valid = new Set();
provider.on("access_token.saved", (token) => valid.add(token));
provider.on("client_credentials.saved", (token) => valid.add(token));

/** The API. The query has the scope and the audience that it requires, and the status if the scope is missing. */
async function api(ctx) {
  const answer = (status, challenge) => {
    count("api", status);
    ctx.status = status;
    ctx.body = challenge ?? "welcome";
    if (challenge) ctx.set("WWW-Authenticate", challenge);
  };
  const value = /^Bearer (\S+)$/i.exec(ctx.get("Authorization"))?.[1];
  // RFC 6750 §3.1: no error code without a token.
  if (!value) return answer(401, 'Bearer realm="api"');
  const token = await provider.AccessToken.find(value) ?? await provider.ClientCredentials.find(value);
  const { scope, audience, status = 403 } = ctx.query;
  if (!token || (audience && token.aud !== audience)) {
    return answer(401, 'Bearer realm="api", error="invalid_token"');
  }
  if (scope && !token.scopes.has(scope)) {
    return answer(Number(status), `Bearer realm="api", error="insufficient_scope", scope="${scope}"`);
  }
  return answer(200);
}

/** A promise, and the function that resolves it. */
function signal() {
  let resolve;
  const promise = new Promise((done) => { resolve = done; });
  return { promise, resolve };
}

/** The token response that is held or is to be held. */
let held;

const control = {
  counts: () => counts,
  set: (query) => {
    for (const [name, value] of Object.entries(query)) settings[name] = JSON.parse(value);
  },
  /** Stands for a login: returns a refresh token of a new grant. */
  login: async ({ client_id }) => {
    const bound = { clientId: client_id, accountId: "user" };
    const grant = new provider.Grant(bound);
    grant.addOIDCScope("offline_access read");
    const grantId = await grant.save();
    const client = await provider.Client.find(client_id);
    const scope = "offline_access read";
    return new provider.RefreshToken({ ...bound, client, grantId, scope, gty: "authorization_code" }).save();
  },
  revoke: async () => {
    for (const token of valid) await token.destroy();
    valid.clear();
  },
  /** Registers a client named for the algorithm, and returns its private key as PEM. */
  register: async ({ alg }) => {
    const [type, options] = {
      ES256: ["ec", { namedCurve: "P-256" }],
      RS256: ["rsa", { modulusLength: 2048 }],
      EdDSA: ["ed25519", {}],
    }[alg];
    const { privateKey, publicKey } = generateKeyPairSync(type, options);
    const jwks = { keys: [{ ...publicKey.export({ format: "jwk" }), kid: `key of ${alg}`, use: "sig" }] };
    const registered = { ...client(alg, "private_key_jwt", "client_credentials"), jwks };
    await provider.Client.adapter.upsert(alg, { ...registered, token_endpoint_auth_signing_alg: alg });
    return privateKey.export({ type: "pkcs8", format: "pem" });
  },
  /** Holds the next token response after the request is processed, until `release`. */
  hold: () => { held = { isNext: true, reached: signal(), released: signal() }; },
  held: () => held.reached.promise,
  release: () => held.released.resolve(),
};

provider.use(async (ctx, rest) => {
  if (ctx.path === "/api") return api(ctx);
  if (ctx.path.startsWith("/test/")) {
    ctx.body = JSON.stringify(await control[ctx.path.slice("/test/".length)](ctx.query) ?? null);
    return;
  }
  const [, document] = /^\/\.well-known\/(.*)/.exec(ctx.path) ?? [];
  if (document) count("metadata", document);
  if (document === "oauth-authorization-server" && !settings.rfc8414) return;
  await rest();
  if (ctx.path === "/token" && held?.isNext) {
    held.isNext = false;
    held.reached.resolve();
    await held.released.promise;
  }
});

server.on("request", provider.callback());
console.log(JSON.stringify({ port }));
process.stdin.on("end", () => process.exit()).resume();
