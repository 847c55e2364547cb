//! What can go wrong, as the C++ side sees it.

/// Mirrors `enum tc_status` of the C header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    Ok = 0,
    /// The caller's text, messages or options are at fault.
    Invalid = 1,
    /// A file of the model is damaged or contradicts itself.
    BadFile = 2,
    /// The file is sound, but asks for something this library cannot do exactly.
    Unsupported = 3,
    /// A fault of this library (a caught panic).
    Internal = 4,
    /// The text has more tokens than the caller has room for.
    TooLong = 5,
    /// The caller's stop flag ended the work.
    Stopped = 6,
}

#[derive(Debug)]
pub struct Fault {
    pub status: Status,
    pub message: String,
}

pub type Fallible<T> = Result<T, Fault>;

impl Fault {
    pub fn invalid(message: impl Into<String>) -> Fault {
        Fault { status: Status::Invalid, message: message.into() }
    }
    pub fn bad_file(message: impl Into<String>) -> Fault {
        Fault { status: Status::BadFile, message: message.into() }
    }
    pub fn unsupported(message: impl Into<String>) -> Fault {
        Fault { status: Status::Unsupported, message: message.into() }
    }
    pub fn too_long(message: impl Into<String>) -> Fault {
        Fault { status: Status::TooLong, message: message.into() }
    }
    pub fn stopped() -> Fault {
        Fault { status: Status::Stopped, message: "tokenizing was stopped".to_string() }
    }
    pub fn internal(message: impl Into<String>) -> Fault {
        Fault { status: Status::Internal, message: message.into() }
    }
}

/// Shortens text for a message; cuts at a character boundary.
pub fn excerpt(text: &str, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        None => text.to_string(),
        Some((cut, _)) => format!("{}…", &text[..cut]),
    }
}
