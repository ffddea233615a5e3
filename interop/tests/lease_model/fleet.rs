//! [`Fleet`]: a state of the token endpoint, the store and the processes.

/// A state of the model. It has no time: what takes long is a step that comes late.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Fleet {
    pub(crate) endpoint: Endpoint,
    pub(crate) store: Store,
    /// Sorted where the order does not matter: nothing refers to a process by its index.
    pub(crate) processes: Vec<Process>,
    /// What may still happen.
    pub(crate) left: Faults,
    pub(crate) seen: Seen,
}

/// How often each fault happens at most, and how often all access tokens expire.
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
pub(crate) struct Faults {
    /// Of all kinds together. An expiry is none.
    pub(crate) total: u8,
    pub(crate) expiries: u8,
    /// A process is killed. It starts again with an empty memory.
    pub(crate) crashes: u8,
    /// An operation of the store fails, performed or not.
    pub(crate) store: u8,
    /// The store fails for all processes, for longer than a lease, but not while one of them asks the endpoint.
    pub(crate) outages: u8,
    /// A request to the token endpoint, or its answer, is lost.
    pub(crate) lost: u8,
    /// A lease ends while its holder works: that was stopped for too long, or the store forgot the lease. Or a process that is
    /// about to store something takes too long.
    pub(crate) early: u8,
    /// The store loses its newest record, and the lease.
    pub(crate) rollbacks: u8,
}

/// What has happened, for the properties.
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
pub(crate) struct Seen {
    /// A spent refresh token was presented.
    pub(crate) spent_presented: bool,
    /// A record has replaced one whose refresh token was granted later, or still works.
    pub(crate) newer_replaced: bool,
    /// A refresh token that was granted has never reached its process, or was lost with it.
    pub(crate) grant_lost: bool,
}

/// The token endpoint. Refresh tokens are numbered in the order of their grants; 0 is the first one of the login.
#[derive(Clone, Debug, Default, Hash, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) granted: u8,
    /// A bit for each refresh token.
    pub(crate) spent: u32,
    /// The refresh token that was spent last. With a grace, it is accepted again.
    pub(crate) last: Option<u8>,
    /// All refresh tokens of the login are invalid.
    pub(crate) is_revoked: bool,
    /// Access tokens up to this one are about to expire; 0 if none is. They have the numbers of the refresh tokens that
    /// were granted with them.
    pub(crate) expiring: u8,
    /// Access tokens up to this one have expired.
    pub(crate) expired: u8,
}

/// What the endpoint does with a refresh token that was spent before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reuse {
    /// The one that was spent last is accepted. Any other revokes the login.
    Grace,
    /// It is rejected.
    Rejects,
    /// It is rejected, and revokes the login.
    Revokes,
}

#[derive(Clone, Debug, Default, Hash, PartialEq, Eq)]
pub(crate) struct Store {
    pub(crate) record: Option<Known>,
    /// The record before, for a failover.
    pub(crate) previous: Option<Known>,
    /// The fence of the lease that has not ended.
    pub(crate) lease: Option<u8>,
    /// The newest fence.
    pub(crate) fence: u8,
}

/// What a record, or a process, knows: `Known` and `LoginChain` in `src/chain.rs`.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Known {
    /// `None` if the login has ended.
    pub(crate) refresh_token: Option<u8>,
    /// Its access token; 0 if that has expired.
    pub(crate) access_token: u8,
    pub(crate) version: u8,
    pub(crate) granted_at: u8,
    pub(crate) is_presented: bool,
}

#[derive(Clone, Debug, Default, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Process {
    pub(crate) at: At,
    /// The access token that its callers have; 0 if that has expired.
    pub(crate) access_token: u8,
    /// Whether that is expiring, as far as the process knows: then it may refresh, but need not.
    pub(crate) is_expiring: bool,
    /// Whether it refreshes ahead of the expiry.
    pub(crate) refreshes: bool,
    pub(crate) known: Option<Known>,
    /// Whether the store does not have what is known.
    pub(crate) is_unstored: bool,
    /// The version of the record in which this process has marked its refresh token as presented.
    pub(crate) marked: u8,
    /// The version of the record that another process has marked, and whether that was waited for.
    pub(crate) seen_mark: Option<(u8, bool)>,
    pub(crate) cannot_write: bool,
    pub(crate) publisher: Publisher,
}

/// Where a process is in the protocol, with the fence of its lease.
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum At {
    Down,
    #[default]
    Idle,
    /// Asks for the lease.
    Asks,
    /// Waits for what another process may be about to store.
    Waits,
    Leased(u8),
    /// Has read under the lease.
    Read(u8),
    /// The request that presents this refresh token is on its way.
    Sent(u8, u8),
    /// The endpoint has processed it; the answer is on its way.
    Answered(u8, u8, Answer),
    Publishes(u8),
    Releases(u8),
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Answer {
    /// The refresh token that was granted, and the access token of the same number.
    Granted(u8),
    Rejected,
    Lost,
}

/// The task that stores in the background what an exchange could not store.
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Publisher {
    #[default]
    None,
    /// Tries again under the lease of the exchange.
    Keeps(u8),
    /// Takes another lease.
    Waits,
    Leased(u8),
}

impl Fleet {
    pub(crate) fn new(processes: usize, left: Faults) -> Self {
        Self {
            endpoint: Endpoint::default(),
            store: Store::default(),
            processes: vec![Process::default(); processes],
            left,
            seen: Seen::default(),
        }
    }

    /// Whether the process that has this lease works, and so extends it.
    pub(crate) fn is_extended(&self, lease: u8) -> bool {
        self.processes.iter().any(|process| {
            process.at.fence() == Some(lease)
                || [Publisher::Keeps(lease), Publisher::Leased(lease)].contains(&process.publisher)
        })
    }

    /// Whether another process than this is about to store something.
    pub(crate) fn is_about_to_store(&self, but: usize) -> bool {
        let stores = |process: &Process| {
            process.publisher != Publisher::None || matches!(process.at, At::Publishes(_))
        };
        self.processes.iter().enumerate().any(|(index, process)| index != but && stores(process))
    }

    /// The endpoint processes a request that presents this refresh token.
    pub(crate) fn present(&mut self, refresh_token: u8, reuse: Reuse) -> Answer {
        let endpoint = &mut self.endpoint;
        let bit = 1 << refresh_token;
        if endpoint.is_revoked {
            return Answer::Rejected;
        }
        if endpoint.has_spent(refresh_token) {
            self.seen.spent_presented = true;
            if !(reuse == Reuse::Grace && endpoint.last == Some(refresh_token)) {
                endpoint.is_revoked = reuse != Reuse::Rejects;
                return Answer::Rejected;
            }
        }
        endpoint.spent |= bit;
        endpoint.last = Some(refresh_token);
        endpoint.granted += 1;
        Answer::Granted(endpoint.granted)
    }

    /// Stores what is known under this fence. Returns false if a newer lease was granted.
    pub(crate) fn publish(&mut self, known: Known, fence: u8, checks_fence: bool) -> bool {
        if checks_fence && self.store.fence > fence {
            return false;
        }
        if let Some(old) = self.store.record.and_then(|record| record.refresh_token) {
            self.seen.newer_replaced |= match known.refresh_token {
                Some(new) => new < old && self.endpoint.has_spent(new),
                None => !self.endpoint.is_revoked && !self.endpoint.has_spent(old),
            };
        }
        self.store.previous = self.store.record;
        self.store.record = Some(Known { version: fence, ..known });
        true
    }

    /// Whether the login goes on: the store, or a process, has a refresh token that works.
    pub(crate) fn has_login(&self) -> bool {
        let of_processes = self.processes.iter().map(|process| process.known);
        let mut known = of_processes.chain([self.store.record]).flatten();
        let works = |known: Known| known.refresh_token.is_some_and(|token| !self.endpoint.has_spent(token));
        !self.endpoint.is_revoked && known.any(works)
    }

    /// Whether nothing happens until an access token is about to expire.
    pub(crate) fn is_idle(&self) -> bool {
        let is_idle = |process: &Process| {
            let begins = process.needs() || (process.is_expiring && !process.has_ended());
            process.at == At::Idle && process.publisher == Publisher::None && !begins
        };
        self.store.lease.is_none() && self.processes.iter().all(is_idle)
    }

    /// The refresh tokens that are presented now.
    pub(crate) fn presented(&self) -> impl Iterator<Item = u8> {
        self.processes.iter().filter_map(|process| match process.at {
            At::Sent(_, refresh_token) | At::Answered(_, refresh_token, _) => Some(refresh_token),
            _ => None,
        })
    }
}

impl Endpoint {
    pub(crate) fn has_spent(&self, refresh_token: u8) -> bool {
        self.spent & (1 << refresh_token) != 0
    }
}

impl At {
    pub(crate) fn fence(self) -> Option<u8> {
        match self {
            Self::Leased(fence) | Self::Read(fence) | Self::Publishes(fence) | Self::Releases(fence) => {
                Some(fence)
            }
            Self::Sent(fence, _) | Self::Answered(fence, ..) => Some(fence),
            Self::Down | Self::Idle | Self::Asks | Self::Waits => None,
        }
    }
}

impl Known {
    /// The configuration's refresh token, which every process has.
    pub(crate) const SEED: Self =
        Self { refresh_token: Some(0), access_token: 0, version: 0, granted_at: 0, is_presented: false };

    /// Which of two is newer: by the order of the grants first.
    pub(crate) fn order(&self) -> (u8, u8, bool) {
        (self.granted_at, self.version, !self.is_presented)
    }
}

impl Process {
    pub(crate) fn needs(&self) -> bool {
        !self.has_ended() && (self.access_token == 0 || self.refreshes)
    }

    /// Its callers get this access token.
    pub(crate) fn serve(&mut self, access_token: u8, is_expiring: bool) {
        (self.access_token, self.is_expiring, self.refreshes) = (access_token, is_expiring, false);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.known.is_some_and(|known| known.refresh_token.is_none())
    }
}
