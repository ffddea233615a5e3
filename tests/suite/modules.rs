//! The modules import only what is below them, in the order that CONTRIBUTING.md draws, and a name is that of one type.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// A module, such as `["source", "client", "tls"]`. The crate's own is empty.
type Module = Vec<String>;

/// What a source file defines, hands on and uses.
#[derive(Default)]
struct Source {
    types: BTreeSet<String>,
    items: BTreeSet<String>,
    /// The paths of `pub use`, by their last name: no dependency, but a name for one.
    handed_on: BTreeMap<String, Vec<String>>,
    paths: Vec<Vec<String>>,
    /// The words of its code, by which a name that is handed on may also be used.
    words: BTreeSet<String>,
}

/// Splits code into words, `::` and other characters. Comments, texts and unit tests are left out.
fn tokens(code: &str) -> Vec<String> {
    let tests = code.find("\nmod tests").filter(|at| code[..*at].ends_with(")]"));
    let (mut rest, mut tokens) = (&code[..tests.unwrap_or(code.len())], Vec::new());
    while let Some(first) = rest.chars().next() {
        let is_word = |char: char| char.is_alphanumeric() || char == '_';
        assert!(
            !rest.starts_with("/*"),
            "a comment of another kind than `//`: {}",
            &rest[..rest.len().min(40)]
        );
        let raw = rest
            .strip_prefix('r')
            .map(|rest| rest.trim_start_matches('#'))
            .filter(|rest| rest.starts_with('"'));
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(text) = raw {
            let hashes = rest.len() - text.len() - 1;
            let end = format!("\"{}", "#".repeat(hashes));
            1 + hashes + 1 + text[1..].find(&end).map_or(text.len() - 1, |at| at + end.len())
        } else if first == '"' {
            let mut chars = rest.char_indices().skip(1);
            let mut end = rest.len();
            while let Some((at, char)) = chars.next() {
                match char {
                    '\\' => _ = chars.next(),
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    _ => {}
                }
            }
            end
        } else if rest.starts_with("'\"'") || rest.starts_with("'\\\"'") {
            rest[1..].find('\'').map_or(rest.len(), |at| at + 2)
        } else if is_word(first) {
            rest.find(|char| !is_word(char)).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        let token = &rest[..length];
        if (is_word(first) && raw.is_none()) || !(token.trim().is_empty() || token.contains(['/', '"'])) {
            tokens.push(token.to_owned());
        }
        rest = &rest[length..];
    }
    tokens
}

/// Reads the tree of a `use` up to its end, and adds its paths.
fn read_use(
    tokens: &mut impl Iterator<Item = String>,
    prefix: &[String],
    paths: &mut Vec<Vec<String>>,
) -> String {
    let mut path = prefix.to_vec();
    let add = |path: &[String], paths: &mut Vec<Vec<String>>| {
        if path.len() > prefix.len() {
            paths.push(path.to_vec());
        }
    };
    while let Some(token) = tokens.next() {
        match &*token {
            "::" => {}
            "{" => {
                while read_use(tokens, &path, paths) == "," {}
                path = prefix.to_vec();
            }
            // By its name here.
            "as" => path.extend(tokens.next().map(|name| format!("as {name}"))),
            "," | "}" | ";" => {
                add(&path, paths);
                return token;
            }
            _ => path.push(token),
        }
    }
    String::new()
}

fn read(code: &str) -> Source {
    let mut source = Source::default();
    let tokens = tokens(code);
    let mut at = 0;
    while at < tokens.len() {
        let (token, next) = (&*tokens[at], tokens.get(at + 1));
        match token {
            "use" if next.is_some_and(|next| next != "<") => {
                let mut paths = Vec::new();
                let mut rest = tokens[at + 1..].iter().cloned();
                read_use(&mut rest, &[], &mut paths);
                let is_public = at > 0 && matches!(&*tokens[at - 1], "pub" | ")");
                for mut path in paths {
                    if path.last().is_some_and(|last| last == "self") && path.len() > 1 {
                        path.pop();
                    }
                    let last = path.last().unwrap().clone();
                    let name = last.strip_prefix("as ").unwrap_or(&last).to_owned();
                    path.retain(|part| !part.starts_with("as "));
                    if is_public {
                        source.handed_on.insert(name, path);
                    } else {
                        source.paths.push(path);
                    }
                }
                at = tokens.len() - rest.len();
                continue;
            }
            "struct" | "enum" | "trait" | "union" | "type" | "fn" | "const" | "static" => {
                if let Some(name) = next.filter(|name| *name != "fn") {
                    source.items.insert(name.clone());
                    if matches!(token, "struct" | "enum" | "trait" | "union") {
                        source.types.insert(name.clone());
                    }
                }
            }
            "extern" => panic!("`extern crate` gives the crate another name"),
            // A path, also one that begins with the name of an inner module.
            _ if next.is_some_and(|next| next == "::") && (at == 0 || tokens[at - 1] != "::") => {
                let mut path = vec![token.to_owned()];
                while tokens.get(at + 1).is_some_and(|next| next == "::") {
                    path.extend(tokens.get(at + 2).cloned());
                    at += 2;
                }
                source.paths.push(path);
            }
            _ if at > 0 && tokens[at - 1] == "mod" => {}
            _ => _ = source.words.insert(token.to_owned()),
        }
        at += 1;
    }
    source
}

fn read_all(folder: &Path, module: &[String], sources: &mut BTreeMap<Module, Source>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let mut inner = module.to_vec();
        if path.is_dir() {
            inner.push(name);
            read_all(&path, &inner, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") && name != "tests" {
            if !matches!(&*name, "mod" | "lib") {
                inner.push(name);
            }
            sources.insert(inner, read(&fs::read_to_string(&path).unwrap()));
        }
    }
}

/// The module that defines what a path names. `None` if it is none of this crate.
fn resolve(sources: &BTreeMap<Module, Source>, from: &[String], path: &[String]) -> Option<Module> {
    let (first, mut rest) = path.split_first()?;
    let mut module = match &**first {
        "crate" => Vec::new(),
        "self" => from.to_vec(),
        // From a module within the file.
        "super" if rest.first().is_some_and(|name| sources[from].items.contains(name)) => {
            return Some(from.to_vec());
        }
        "super" => from[..from.len() - 1].to_vec(),
        inner => {
            let inner: Module = from.iter().cloned().chain([inner.to_owned()]).collect();
            return sources
                .contains_key(&inner)
                .then(|| resolve(sources, &inner, &[&["self".to_owned()], rest].concat()))?;
        }
    };
    while let Some((name, after)) = rest.split_first() {
        if name == "super" {
            module.pop();
        } else {
            let mut inner = module.clone();
            inner.push(name.clone());
            if sources.contains_key(&inner) {
                module = inner;
            } else {
                let source = &sources[&module];
                let handed_on = source.handed_on.get(name).filter(|_| !source.items.contains(name));
                return handed_on.map_or(Some(module.clone()), |path| resolve(sources, &module, path));
            }
        }
        rest = after;
    }
    Some(module)
}

/// The order of CONTRIBUTING.md: the rank of each module, the topmost first.
fn order(contributing: &str) -> BTreeMap<Module, usize> {
    let block = contributing.split("## Order of the modules").nth(1).unwrap().split("```").nth(1).unwrap();
    let mut order = BTreeMap::new();
    for line in block.lines().skip(1) {
        let (unit, files) = line.split_once(':').unwrap_or((line, "mod"));
        for file in files.split_whitespace() {
            let mut module = vec![unit.trim().to_owned()];
            module.extend(file.split('/').filter(|name| *name != "mod").map(str::to_owned));
            let rank = order.len();
            assert!(order.insert(module, rank).is_none(), "twice: {line}");
        }
    }
    order
}

fn sources() -> BTreeMap<Module, Source> {
    let mut sources = BTreeMap::new();
    read_all(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &[], &mut sources);
    sources
}

/// A module that imports one above it, by `use` or by a path, makes a circle that nobody can read from one end.
#[test]
fn modules_import_only_what_is_below() {
    let contributing =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("CONTRIBUTING.md")).unwrap();
    let (sources, order) = (sources(), order(&contributing));
    let mut listed: BTreeSet<_> = order.keys().cloned().collect();
    listed.insert(Vec::new());
    assert_eq!(
        sources.keys().cloned().collect::<BTreeSet<_>>(),
        listed,
        "the modules, and those in CONTRIBUTING.md"
    );
    let (mut checked, mut wrong) = (0, Vec::new());
    for (module, source) in sources.iter().filter(|(module, _)| !module.is_empty()) {
        // A module may hand on what is in its own folder, as long as it does not use it itself.
        let handed_on = source.handed_on.iter().filter(|(name, path)| {
            source.words.contains(*name)
                || resolve(&sources, module, path).is_some_and(|of| !of.starts_with(module))
        });
        for path in source.paths.iter().chain(handed_on.map(|(_, path)| path)) {
            let Some(used) = resolve(&sources, module, path).filter(|used| used != module) else { continue };
            checked += 1;
            if used.is_empty() || order[&used] <= order[module] {
                wrong.push(format!("{} uses {}, which is not below it", module.join("/"), path.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(checked > 300, "{checked}");
}

/// A reader who meets a name a second time may take it for the first.
#[test]
fn each_type_has_its_own_name() {
    let mut known = BTreeMap::new();
    for (module, source) in &sources() {
        for name in &source.types {
            let other = known.insert(name.clone(), module.clone());
            assert!(other.is_none(), "{name} is in {other:?} and in {module:?}");
        }
    }
}
