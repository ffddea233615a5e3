//! The five scripts that access a record and its lease, each in one step.

use std::sync::LazyLock;

use redis::Script;

/// KEYS: the record, the lease. Returns the version, the remaining lifetime in ms or an empty string, and the text;
/// or nil.
///
/// The hash's field for the version is `generation`: renaming it would make existing records unreadable.
const LOAD: &str = r"
    local found = redis.call('HMGET', KEYS[1], 'generation', 'expires_at', 'text')
    if not found[1] or not found[3] then return false end
    local left, expires_at = found[2] or '', tonumber(found[2])
    if expires_at then
        local time = redis.call('TIME')
        left = string.format('%.0f', math.max(0, expires_at - (time[1] * 1000 + math.floor(time[2] / 1000))))
    end
    return {found[1], left, found[3]}
";

/// KEYS: the record, the lease. ARGV: the lease's length and the record's retention, in ms, and the lease's owner.
/// Returns the fence and Redis' time in ms; or nil.
///
/// The fence is based on the clock, so that it is greater than any fence that was lost in a flush or a failover. A
/// stored fence that is not a number, or is beyond the integers that Lua represents exactly, was not written by this
/// crate and is ignored. So is a lease without an expiry.
///
/// A lease of the same owner is granted again, with its fence: its grant did not arrive. The SET of a key that exists
/// has no effect, but makes a replica answer READONLY instead of reporting a lease of its former master.
const LEASE: &str = r"
    local time = redis.call('TIME')
    local newest = redis.call('HMGET', KEYS[1], 'fence', 'owner')
    local last = tonumber(newest[1]) or 0
    if not (last < 2 ^ 53) then last = 0 end
    local fence = string.format('%.0f', math.max(time[1] * 1000000 + time[2], last + 1))
    if redis.call('PTTL', KEYS[2]) >= 0 then
        if newest[2] ~= ARGV[3] or redis.call('GET', KEYS[2]) ~= newest[1] then
            redis.call('SET', KEYS[2], fence, 'NX')
            return false
        end
        fence = newest[1]
    end
    local kept = redis.call('PTTL', KEYS[1])
    redis.call('HSET', KEYS[1], 'fence', fence, 'owner', ARGV[3])
    if kept == -2 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
    redis.call('SET', KEYS[2], fence, 'PX', ARGV[1])
    return {fence, string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))}
";

/// KEYS: the record, the lease. ARGV: the fence, the token's expiry in Redis' time in ms or an empty string, the
/// text, the retention in ms or an empty string. Returns whether the record is stored.
///
/// If the stored fence was lost, the record is stored, because no lease was granted since.
const PUBLISH: &str = r"
    local newest = tonumber(redis.call('HGET', KEYS[1], 'fence'))
    if newest and newest > tonumber(ARGV[1]) then return 0 end
    redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'generation', ARGV[1], 'expires_at', ARGV[2], 'text', ARGV[3])
    if ARGV[4] == '' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
    return 1
";

/// KEYS: the record, the lease. ARGV: the fence, the lease's length in ms. Returns whether the lease was extended.
const EXTEND: &str = r"
    if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
    redis.call('PEXPIRE', KEYS[2], ARGV[2])
    return 1
";

/// KEYS: the record, the lease. ARGV: the fence.
const RELEASE: &str = r"
    if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
    return 1
";

pub(super) struct Scripts {
    pub(super) load: Script,
    pub(super) lease: Script,
    pub(super) extend: Script,
    pub(super) publish: Script,
    pub(super) release: Script,
}

pub(super) static SCRIPTS: LazyLock<Scripts> = LazyLock::new(|| Scripts {
    load: Script::new(LOAD),
    lease: Script::new(LEASE),
    extend: Script::new(EXTEND),
    publish: Script::new(PUBLISH),
    release: Script::new(RELEASE),
});
