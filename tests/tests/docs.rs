//! What the documentation names is there: files, functions, commands, options.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use blobcr_tests::daemon::blobcr;
use blobcr_tests::guest_image::repository_root;

/// Directories of no sources: what is built, and git's own.
const NOT_SOURCES: [&str; 3] = ["target", ".git", ".cargo"];
/// What a name of a file ends with, where it has no directory before it.
const EXTENSIONS: [&str; 8] = [".rs", ".sh", ".proto", ".h", ".c", ".toml", ".md", ".hex"];

/// Every page: its path from the root, and its text.
fn pages() -> BTreeMap<PathBuf, String> {
    let root = repository_root();
    let mut names: Vec<PathBuf> = vec!["README.md".into(), "ARCHITECTURE.md".into()];
    for entry in fs::read_dir(root.join("docs")).unwrap() {
        let name = Path::new("docs").join(entry.unwrap().file_name());
        if name.extension().is_some_and(|end| end == "md") {
            names.push(name);
        }
    }
    assert!(names.len() > 7, "{names:?}");
    names
        .into_iter()
        .map(|name| {
            let text = fs::read_to_string(root.join(&name)).unwrap();
            (name, text)
        })
        .collect()
}

/// Every source file, by its path from the root.
fn sources() -> BTreeSet<PathBuf> {
    fn walk(root: &Path, dir: &Path, found: &mut BTreeSet<PathBuf>) {
        for entry in fs::read_dir(root.join(dir)).unwrap() {
            let entry = entry.unwrap();
            let path = dir.join(entry.file_name());
            if NOT_SOURCES.iter().any(|name| path.ends_with(name)) {
                continue;
            }
            match entry.file_type().unwrap().is_dir() {
                true => walk(root, &path, found),
                false => drop(found.insert(path)),
            }
        }
    }
    let mut found = BTreeSet::new();
    walk(&repository_root(), Path::new(""), &mut found);
    found
}

/// A page without its blocks of code, and those blocks.
fn split(text: &str) -> (String, Vec<String>) {
    let (mut prose, mut blocks) = (String::new(), Vec::new());
    for (at, part) in text.split("\n```").enumerate() {
        match at % 2 {
            0 => prose.push_str(part.split_once('\n').map_or("", |(_, rest)| rest)),
            _ => blocks.push(part.split_once('\n').map_or("", |(_, rest)| rest).to_owned()),
        }
        prose.push('\n');
    }
    (prose, blocks)
}

/// What stands between two backticks in prose.
fn quoted(prose: &str) -> Vec<&str> {
    prose.split('`').skip(1).step_by(2).collect()
}

/// The targets of links to other files of the repository.
fn links(prose: &str) -> Vec<&str> {
    let targets = prose.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
    targets.filter(|target| !target.contains("://") && !target.starts_with('#')).collect()
}

fn is_path(word: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./*".contains(c);
    if !word.chars().all(plain) || word.starts_with('/') || word.starts_with("./") {
        return false;
    }
    match word.split_once('/') {
        Some((first, _)) => first != "target" && repository_root().join(first).is_dir(),
        None => EXTENSIONS.iter().any(|end| word.ends_with(end)) && !word.starts_with('*'),
    }
}

/// Whether a path with stars, a directory, or a name without its directory is there.
fn is_there(word: &str, sources: &BTreeSet<PathBuf>) -> bool {
    if let Some((before, after)) = word.split_once('*') {
        return sources.iter().filter_map(|path| path.to_str()).any(|path| {
            path.strip_prefix(before).is_some_and(|rest| {
                rest.strip_suffix(after).is_some_and(|middle| !middle.contains('/'))
            })
        });
    }
    if word.contains('/') {
        return repository_root().join(word).exists();
    }
    sources.iter().any(|path| path.ends_with(word))
}

#[test]
fn every_file_that_is_named_is_there() {
    let sources = sources();
    let mut seen = 0;
    let mut lost = Vec::new();
    for (page, text) in pages() {
        let (prose, _) = split(&text);
        for word in quoted(&prose).into_iter().filter(|word| is_path(word)) {
            seen += 1;
            if !is_there(word, &sources) {
                lost.push(format!("{}: {word}", page.display()));
            }
        }
        let dir = repository_root().join(page.parent().unwrap());
        for target in links(&prose) {
            seen += 1;
            if !dir.join(target.split('#').next().unwrap()).exists() {
                lost.push(format!("{}: the link {target}", page.display()));
            }
        }
    }
    assert!(lost.is_empty(), "named, and not there: {lost:#?}");
    assert!(seen > 100, "{seen}: the pages are not read as they are written");
}

#[test]
fn every_function_that_is_named_is_there() {
    let code: String = sources()
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| fs::read_to_string(repository_root().join(path)).unwrap())
        .collect();
    let mut seen = 0;
    for (page, text) in pages() {
        let (prose, _) = split(&text);
        for word in quoted(&prose) {
            let Some(path) = word.strip_suffix("()") else { continue };
            let name = path.rsplit("::").next().unwrap();
            seen += 1;
            let is_there =
                code.contains(&format!("fn {name}(")) || code.contains(&format!("fn {name}<"));
            assert!(is_there, "{}: {word} is no function", page.display());
        }
    }
    assert!(seen > 30, "{seen}: the pages are not read as they are written");
}

#[test]
fn every_do_command_that_is_named_is_there() {
    let list = fs::read_to_string(repository_root().join("do")).unwrap();
    let mut seen = BTreeSet::new();
    for (page, text) in pages() {
        for rest in text.split("./do ").skip(1) {
            let end =
                rest.find(|c: char| c != '-' && !c.is_ascii_lowercase()).unwrap_or(rest.len());
            let name = &rest[..end];
            assert!(list.contains(&format!("\ndo_{name}() {{")), "{}: ./do {name}", page.display());
            seen.insert(name.to_owned());
        }
    }
    assert!(seen.contains("demo") && seen.contains("test"), "{seen:?}");
}

fn run(words: &[&str]) -> Output {
    let mut command = Command::new(blobcr().unwrap());
    command.args(words).arg("--help").stdin(Stdio::null()).output().unwrap()
}

#[test]
fn every_command_of_the_readme_parses() {
    let text = &pages()[Path::new("README.md")];
    let (_, blocks) = split(text);
    let lines = blocks.iter().flat_map(|block| block.lines());
    let mut seen = 0;
    for line in lines.filter_map(|line| line.strip_prefix("$ blobcr ")) {
        // What it is given is parsed before the help is shown: options and values must be right.
        let words: Vec<_> = line.split(' ').take_while(|word| *word != "&").collect();
        let output = run(&words);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "blobcr {line}: {told}");
        seen += 1;
    }
    assert!(seen > 20, "{seen}: the README is not read as it is written");
}

#[test]
fn every_option_of_a_page_is_in_the_help() {
    let verbs = [
        "up",
        "status",
        "doctor",
        "metadata",
        "metadata migrate",
        "repo-node",
        "mirror",
        "proxy",
        "steward",
        "gc",
        "scrub",
        "snapshot prune",
        "image import",
        "image export",
        "image clone",
        "disk attach",
        "disk fork",
        "disk detach",
        "disk checkpoint",
        "snapshot wait",
        "snapshot pin",
        "snapshot unpin",
        "vm add",
        "set list",
        "set pin",
        "set prune",
        "set restart",
        "pool create",
        "node drain",
    ];
    let help: String = verbs
        .iter()
        .map(|verb| String::from_utf8(run(&verb.split(' ').collect::<Vec<_>>()).stdout).unwrap())
        .collect();
    let mut seen = BTreeSet::new();
    for page in ["blobcr", "up", "metadata", "repo-node", "mirror", "proxy", "steward"] {
        let text = &pages()[Path::new(&format!("docs/{page}.md"))];
        for rest in text.split(['`', ' ', '[', '\n']).filter(|word| word.starts_with("--")) {
            let end = rest.find(|c: char| c != '-' && !c.is_ascii_lowercase());
            let option = &rest[..end.unwrap_or(rest.len())];
            if option.len() > 2 && !option.starts_with("---") {
                assert!(
                    help.contains(&format!("{option} ")) || help.contains(&format!("{option}\n")),
                    "docs/{page}.md: there is no {option}"
                );
                seen.insert(option.to_owned());
            }
        }
    }
    assert!(seen.len() > 15, "{seen:?}");
}
