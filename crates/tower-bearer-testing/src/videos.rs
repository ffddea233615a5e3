//! api.video's resources in JSON: a video, a page of the list of videos, and an upload token.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use form_urlencoded::Serializer;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// By ID.
pub(super) type Videos = BTreeMap<String, Video>;

/// A video of an account. Its bytes are elsewhere.
pub(super) struct Video {
    properties: Properties,
    created: SystemTime,
    pub(super) updated: SystemTime,
}

/// What the client says about its video, with api.video's defaults.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Properties {
    title: String,
    #[serde(default)]
    description: String,
    #[serde(default = "yes")]
    public: bool,
    #[serde(default)]
    panoramic: bool,
    #[serde(default = "yes")]
    mp4_support: bool,
    #[serde(default)]
    tags: Vec<String>,
    #[serde(default)]
    metadata: Vec<Metadata>,
}

#[derive(Deserialize, Serialize)]
struct Metadata {
    key: String,
    value: String,
}

fn yes() -> bool {
    true
}

impl Video {
    pub(super) fn new(properties: Properties) -> Self {
        let now = SystemTime::now();
        Self { properties, created: now, updated: now }
    }

    /// Creates a video of which only the title is known.
    pub(super) fn titled(title: String) -> Self {
        let (description, tags, metadata) = (String::new(), Vec::new(), Vec::new());
        Self::new(Properties {
            title,
            description,
            public: true,
            panoramic: false,
            mp4_support: true,
            tags,
            metadata,
        })
    }

    /// Returns the video as api.video describes it. `base` is the URL of the server: nothing in the document leads a test
    /// to another host.
    pub(super) fn document(&self, id: &str, base: &str) -> Value {
        let player = format!("{base}/vod/{id}");
        let mut document = json!(self.properties);
        document["videoId"] = id.into();
        document["discarded"] = false.into();
        document["createdAt"] = date(self.created).into();
        document["publishedAt"] = date(self.created).into();
        document["updatedAt"] = date(self.updated).into();
        document["source"] = json!({ "type": "upload", "uri": format!("/videos/{id}/source") });
        document["assets"] = json!({
            "hls": format!("{player}/hls/manifest.m3u8"),
            "iframe": format!("<iframe src=\"{player}\"></iframe>"),
            "player": player,
            "thumbnail": format!("{player}/thumbnail.jpg"),
        });
        if self.properties.mp4_support {
            document["assets"]["mp4"] = format!("{player}/mp4/source.mp4").into();
        }
        document
    }

    /// Returns whether a filter in the query of a list selects this video. Other parameters select each video.
    fn matches(&self, name: &str, value: &str) -> bool {
        let own = &self.properties;
        match name {
            "title" => own.title.contains(value),
            "description" => own.description.contains(value),
            "tags" | "tags[]" => own.tags.iter().any(|tag| tag == value),
            _ => name.strip_prefix("metadata[").and_then(|name| name.strip_suffix(']')).is_none_or(|key| {
                own.metadata.iter().any(|metadata| metadata.key == key && metadata.value == value)
            }),
        }
    }
}

/// Returns the page of the list that a query asks for. The error is the name of a parameter that is out of its range.
pub(super) fn page(videos: &Videos, query: &str, base: &str) -> Result<Value, &'static str> {
    let query: Vec<_> = form_urlencoded::parse(query.as_bytes()).collect();
    let get = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| &**value);
    let number = |name, default, accepted: std::ops::RangeInclusive<usize>| {
        let number = get(name).map_or(Some(default), |value| value.parse().ok());
        number.filter(|number| accepted.contains(number)).ok_or(name)
    };
    let current = number("currentPage", 1, 1..=i32::MAX as usize)?;
    let size = number("pageSize", 25, 1..=100)?;

    let mut found: Vec<_> = videos
        .iter()
        .filter(|(_, video)| query.iter().all(|(name, value)| video.matches(name, value)))
        .collect();
    // api.video does not say how a list without `sortBy` is sorted. Here it is by ID.
    match get("sortBy") {
        None => {}
        Some("title") => found.sort_by_key(|(_, video)| &video.properties.title),
        Some("createdAt" | "publishedAt") => found.sort_by_key(|(_, video)| video.created),
        Some("updatedAt") => found.sort_by_key(|(_, video)| video.updated),
        Some(_) => return Err("sortBy"),
    }
    match get("sortOrder") {
        None | Some("asc") => {}
        Some("desc") => found.reverse(),
        Some(_) => return Err("sortOrder"),
    }

    let last = found.len().div_ceil(size).max(1);
    let data: Vec<_> = found
        .iter()
        .skip((current - 1).saturating_mul(size))
        .take(size)
        .map(|(id, video)| video.document(id, base))
        .collect();
    let filters = query.iter().filter(|(name, _)| name != "currentPage" && name != "pageSize");
    let link = |rel: &str, page: usize| {
        let path = "/videos?";
        let uri = Serializer::for_suffix(path.to_owned(), path.len())
            .append_pair("currentPage", &page.to_string())
            .append_pair("pageSize", &size.to_string())
            .extend_pairs(filters.clone())
            .finish();
        json!({ "rel": rel, "uri": uri })
    };
    let mut links = vec![link("self", current), link("first", 1)];
    links.extend((current > 1).then(|| link("previous", current - 1)));
    links.extend((current < last).then(|| link("next", current + 1)));
    links.push(link("last", last));
    let pagination = json!({
        "currentPage": current,
        "currentPageItems": data.len(),
        "pageSize": size,
        "pagesTotal": last,
        "itemsTotal": found.len(),
        "links": links,
    });
    Ok(json!({ "data": data, "pagination": pagination }))
}

/// The longest lifetime of an upload token, in seconds.
pub(super) const MAX_TTL: u64 = i32::MAX as u64;

/// Returns an upload token as api.video describes it. A `ttl` of zero is for a token that does not expire.
pub(super) fn upload_token(token: &str, ttl: u64) -> Value {
    let now = SystemTime::now();
    let mut document = json!({ "token": token, "ttl": ttl, "createdAt": date(now) });
    if ttl > 0 {
        document["expiresAt"] = date(now + Duration::from_secs(ttl)).into();
    }
    document
}

/// Returns a time in whole seconds, such as `2019-12-16T08:25:51Z`.
fn date(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time).replace_nanosecond(0).expect("zero is a nanosecond");
    time.format(&Rfc3339).expect("the year has four digits")
}
