//! Names that people give. They become file names, so what a name may hold is narrow.

use std::fmt;
use std::str::FromStr;

/// Bytes in a name at most: with a suffix it still fits a file name of 255 bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing was given.
    #[error("a name must not be empty")]
    Empty,
    /// Longer than [`NAME_BYTES_MAX`].
    #[error("a name has at most {NAME_BYTES_MAX} bytes; this one has {0}")]
    TooLong(usize),
    /// It starts with something other than a letter or digit (`..` and options among them).
    #[error("the name {0:?} must start with a letter or a digit")]
    BadStart(String),
    /// It holds a character that is not allowed.
    #[error(
        "the name {name:?} has the character {bad:?}; letters, digits, '.', '_', '-' and '+' are allowed"
    )]
    BadCharacter {
        /// The whole name.
        name: String,
        /// The first character that is not allowed.
        bad: char,
    },
    /// What follows `@` is no snapshot number.
    #[error("{0:?} is no snapshot number; write IMAGE@N with N = 1, 2, …")]
    BadNumber(String),
}

fn check(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(NameError::TooLong(name.len()));
    }
    if let Some(bad) =
        name.chars().find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_' | '-' | '+'))
    {
        return Err(NameError::BadCharacter { name: name.to_owned(), bad });
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(NameError::BadStart(name.to_owned()));
    }
    Ok(())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Checks a name.
            ///
            /// # Errors
            /// When it is empty, too long, or holds what a name must not.
            pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
                let name = name.into();
                check(&name).map(|()| Self(name))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    };
}

name_type! {
    /// The name of an image.
    ImageName
}
name_type! {
    /// The name of a repository, where one store holds several.
    RepositoryName
}
name_type! {
    /// The name of a disk of one host.
    DiskName
}
name_type! {
    /// The name of a virtual machine of one host.
    VmName
}
name_type! {
    /// The name of a pool.
    PoolName
}
name_type! {
    /// The name of a group of VMs whose checkpoints form sets.
    GroupName
}

/// `IMAGE` (its newest stable snapshot) or `IMAGE@N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// The image.
    pub image: ImageName,
    /// The snapshot; `None` for the newest stable one.
    pub number: Option<u64>,
}

impl FromStr for ImageSpec {
    type Err = NameError;
    fn from_str(spec: &str) -> Result<Self, NameError> {
        let Some((image, number)) = spec.split_once('@') else {
            return Ok(Self { image: spec.parse()?, number: None });
        };
        Ok(Self { image: image.parse()?, number: Some(parse_snapshot_number(number)?) })
    }
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            Some(number) => write!(f, "{}@{number}", self.image),
            None => write!(f, "{}", self.image),
        }
    }
}

/// Reads a snapshot number: 1, 2, …
///
/// # Errors
/// When the text is no number, or zero.
pub fn parse_snapshot_number(text: &str) -> Result<u64, NameError> {
    match text.parse() {
        Ok(number) if number > 0 && !text.starts_with('+') => Ok(number),
        _ => Err(NameError::BadNumber(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names_pass() {
        for name in ["a", "debian-12", "x.y_z+1", "0", &"n".repeat(128)] {
            assert_eq!(ImageName::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn bad_names_are_refused() {
        for name in ["", "a/b", "/", "..", ".", ".hidden", "-x", "a\nb", "a\0", "a b", "ä", "a@1"]
        {
            assert!(DiskName::new(name).is_err(), "{name:?}");
        }
        assert_eq!(VmName::new("n".repeat(300)), Err(NameError::TooLong(300)));
    }

    #[test]
    fn image_spec_reads_both_forms() {
        let spec: ImageSpec = "base@12".parse().unwrap();
        assert_eq!((spec.image.as_str(), spec.number), ("base", Some(12)));
        assert_eq!(spec.to_string(), "base@12");
        assert_eq!("base".parse::<ImageSpec>().unwrap().number, None);
        for bad in ["base@", "base@0", "base@+1", "base@x", "base@-1", "@1", "a@1@2"] {
            assert!(bad.parse::<ImageSpec>().is_err(), "{bad:?}");
        }
    }
}
