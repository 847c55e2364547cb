//! The C boundary; include/textcore.h documents it. Every function catches panics, takes byte ranges that it does not
//! keep, and hands out memory that the caller gives back through the matching free function.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe, PanicHookInfo};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once};

use crate::fault::{excerpt, Fallible, Fault, Status};
use crate::merge::Limits;
use crate::stream::Stream;
use crate::template::{ChatRequest, ChatTemplate};
use crate::tokenizer::Tokenizer;

/// A borrowed byte range; `data` may be null if `len` is 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TcSlice {
    data: *const u8,
    len: usize,
}

/// Owned bytes, freed by tc_bytes_free.
#[repr(C)]
pub struct TcBytes {
    data: *mut u8,
    len: usize,
    capacity: usize,
}

/// Owned token ids, freed by tc_ids_free.
#[repr(C)]
pub struct TcIds {
    data: *mut u32,
    len: usize,
    capacity: usize,
}

#[repr(C)]
pub struct TcTokenizerInfo {
    vocab_size: u32,
    bos: i64,
    eos: i64,
}

#[repr(C)]
pub struct TcChatRequest {
    messages: TcSlice,
    tools: TcSlice,
    kwargs: TcSlice,
    add_generation_prompt: bool,
    continue_final_message: bool,
}

#[repr(C)]
pub struct TcLimits {
    max_tokens: usize,
    stop: *const AtomicBool,
}

pub struct TcTokenizer(Arc<Tokenizer>);
pub struct TcTemplate(ChatTemplate);
pub struct TcStream(Stream);

const TOKEN_KNOWN: u32 = 1;
const TOKEN_SPECIAL: u32 = 2;
const TOKEN_CONTROL: u32 = 4;

impl TcBytes {
    fn new(bytes: Vec<u8>) -> TcBytes {
        let mut bytes = std::mem::ManuallyDrop::new(bytes);
        TcBytes { data: bytes.as_mut_ptr(), len: bytes.len(), capacity: bytes.capacity() }
    }
}

impl TcIds {
    fn new(ids: Vec<u32>) -> TcIds {
        let mut ids = std::mem::ManuallyDrop::new(ids);
        TcIds { data: ids.as_mut_ptr(), len: ids.len(), capacity: ids.capacity() }
    }
}

thread_local! {
    /// Where and why the last panic of this thread happened.
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics are errors of a call, not output of the process: the hook notes them for `guarded` instead of printing.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|info: &PanicHookInfo| {
            let place = info.location().map_or(String::new(), |at| format!("{}:{}", at.file(), at.line()));
            let text = format!("{place}: {}", panic_text(info.payload()));
            LAST_PANIC.with(|last| *last.borrow_mut() = text);
        }));
    });
}

fn panic_text(payload: &dyn Any) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// Runs `body`; an error or a panic goes to `*error` and its status is returned.
///
/// # Safety
/// `error` is null or points to writable memory.
unsafe fn guarded(error: *mut TcBytes, body: impl FnOnce() -> Fallible<()>) -> i32 {
    quiet_panics();
    let fault = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return Status::Ok as i32,
        Ok(Err(fault)) => fault,
        Err(_) => {
            let place = LAST_PANIC.with(|last| last.borrow().clone());
            Fault::internal(format!("the text library failed at {}", excerpt(&place, 300)))
        }
    };
    if !error.is_null() {
        error.write(TcBytes::new(fault.message.into_bytes()));
    }
    fault.status as i32
}

/// # Safety
/// `slice.data` points to `slice.len` readable bytes that live for `'a`.
unsafe fn bytes_of<'a>(slice: TcSlice) -> &'a [u8] {
    if slice.len == 0 {
        return &[];
    }
    std::slice::from_raw_parts(slice.data, slice.len)
}

/// # Safety
/// As `bytes_of`.
unsafe fn text_of<'a>(slice: TcSlice, name: &str, status: fn(String) -> Fault) -> Fallible<&'a str> {
    std::str::from_utf8(bytes_of(slice))
        .map_err(|error| status(format!("{name}: not valid UTF-8 at byte {}", error.valid_up_to())))
}

/// # Safety
/// `limits` is null or readable, and so is its `stop` for `'a`.
unsafe fn limits_of<'a>(limits: *const TcLimits) -> Limits<'a> {
    limits
        .as_ref()
        .map_or(Limits::default(), |given| Limits { max_tokens: Some(given.max_tokens), stop: given.stop.as_ref() })
}

/// # Safety
/// `config` and `json` are readable; `out` and `error` are writable or, for `error`, null.
#[no_mangle]
pub unsafe extern "C" fn tc_tokenizer_new(
    json: TcSlice,
    config: TcSlice,
    out: *mut *mut TcTokenizer,
    error: *mut TcBytes,
) -> i32 {
    guarded(error, || {
        let json = text_of(json, "tokenizer.json", Fault::bad_file)?;
        let config = text_of(config, "tokenizer_config.json", Fault::bad_file)?;
        let tokenizer = TcTokenizer(Arc::new(Tokenizer::new(json, config)?));
        out.write(Box::into_raw(Box::new(tokenizer)));
        Ok(())
    })
}

/// # Safety
/// `tokenizer` is null or came from tc_tokenizer_new and is not used again.
#[no_mangle]
pub unsafe extern "C" fn tc_tokenizer_free(tokenizer: *mut TcTokenizer) {
    if !tokenizer.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(tokenizer))));
    }
}

/// # Safety
/// `tokenizer` is a live tokenizer, `out` writable.
#[no_mangle]
pub unsafe extern "C" fn tc_tokenizer_get_info(tokenizer: *const TcTokenizer, out: *mut TcTokenizerInfo) {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        let tokenizer = &(*tokenizer).0;
        let id = |id: Option<u32>| id.map_or(-1, i64::from);
        out.write(TcTokenizerInfo {
            vocab_size: tokenizer.pieces().len() as u32,
            bos: id(tokenizer.bos),
            eos: id(tokenizer.eos),
        });
    }));
}

/// # Safety
/// `tokenizer` is a live tokenizer.
#[no_mangle]
pub unsafe extern "C" fn tc_token_flags(tokenizer: *const TcTokenizer, id: u32) -> u32 {
    catch_unwind(AssertUnwindSafe(|| {
        let pieces = (*tokenizer).0.pieces();
        let known = if pieces.is_known(id) { TOKEN_KNOWN } else { 0 };
        let special = if pieces.is_special(id) { TOKEN_SPECIAL } else { 0 };
        let control = if pieces.is_control(id) { TOKEN_CONTROL } else { 0 };
        known | special | control
    }))
    .unwrap_or(0)
}

/// # Safety
/// `tokenizer` is a live tokenizer; the result lives as long as it does.
#[no_mangle]
pub unsafe extern "C" fn tc_token_bytes(tokenizer: *const TcTokenizer, id: u32) -> TcSlice {
    catch_unwind(AssertUnwindSafe(|| {
        let bytes = (*tokenizer).0.pieces().bytes(id).unwrap_or_default();
        TcSlice { data: bytes.as_ptr(), len: bytes.len() }
    }))
    .unwrap_or(TcSlice { data: std::ptr::null(), len: 0 })
}

/// # Safety
/// `tokenizer` is a live tokenizer, `out` writable.
#[no_mangle]
pub unsafe extern "C" fn tc_token_text(
    tokenizer: *const TcTokenizer,
    id: u32,
    out: *mut TcBytes,
    error: *mut TcBytes,
) -> i32 {
    guarded(error, || {
        let bytes = (*tokenizer).0.pieces().bytes(id).unwrap_or_default();
        out.write(TcBytes::new(String::from_utf8_lossy(bytes).into_owned().into_bytes()));
        Ok(())
    })
}

/// # Safety
/// `tokenizer` is a live tokenizer, `text` and `limits` readable (`limits` may be null), `out` writable.
#[no_mangle]
pub unsafe extern "C" fn tc_encode(
    tokenizer: *const TcTokenizer,
    text: TcSlice,
    add_special_tokens: bool,
    limits: *const TcLimits,
    out: *mut TcIds,
    error: *mut TcBytes,
) -> i32 {
    guarded(error, || {
        let text = text_of(text, "prompt", Fault::invalid)?;
        let ids = (*tokenizer).0.encode(text, add_special_tokens, &limits_of(limits))?;
        out.write(TcIds::new(ids));
        Ok(())
    })
}

/// # Safety
/// `tokenizer` is a live tokenizer, `ids` points to `count` ids, `out` is writable.
#[no_mangle]
pub unsafe extern "C" fn tc_decode(
    tokenizer: *const TcTokenizer,
    ids: *const u32,
    count: usize,
    skip_special_tokens: bool,
    out: *mut TcBytes,
    error: *mut TcBytes,
) -> i32 {
    guarded(error, || {
        let ids = if count == 0 { &[] } else { std::slice::from_raw_parts(ids, count) };
        let text = (*tokenizer).0.decode(ids, skip_special_tokens);
        out.write(TcBytes::new(text.into_bytes()));
        Ok(())
    })
}

/// # Safety
/// `tokenizer` is a live tokenizer; the stream keeps its own share of it. `out` is writable.
#[no_mangle]
pub unsafe extern "C" fn tc_stream_new(
    tokenizer: *const TcTokenizer,
    skip_special_tokens: bool,
    continues: bool,
    out: *mut *mut TcStream,
    error: *mut TcBytes,
) -> i32 {
    guarded(error, || {
        let stream = Stream::new((*tokenizer).0.clone(), skip_special_tokens, continues);
        out.write(Box::into_raw(Box::new(TcStream(stream))));
        Ok(())
    })
}

/// # Safety
/// `stream` is a live stream used by one thread at a time; the text lives until its next call.
#[no_mangle]
pub unsafe extern "C" fn tc_stream_push(
    stream: *mut TcStream,
    id: u32,
    text: *mut TcSlice,
    error: *mut TcBytes,
) -> i32 {
    guarded(error, || {
        let piece = (*stream).0.push(id);
        text.write(TcSlice { data: piece.as_ptr(), len: piece.len() });
        Ok(())
    })
}

/// # Safety
/// As tc_stream_push.
#[no_mangle]
pub unsafe extern "C" fn tc_stream_finish(stream: *mut TcStream, text: *mut TcSlice, error: *mut TcBytes) -> i32 {
    guarded(error, || {
        let piece = (*stream).0.finish();
        text.write(TcSlice { data: piece.as_ptr(), len: piece.len() });
        Ok(())
    })
}

/// # Safety
/// `stream` is null or came from tc_stream_new and is not used again.
#[no_mangle]
pub unsafe extern "C" fn tc_stream_free(stream: *mut TcStream) {
    if !stream.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(stream))));
    }
}

/// # Safety
/// `tokenizer` is a live tokenizer; the template keeps its own share of it. `out` gets null if there is no template.
#[no_mangle]
pub unsafe extern "C" fn tc_template_new(
    tokenizer: *const TcTokenizer,
    config: TcSlice,
    jinja: TcSlice,
    out: *mut *mut TcTemplate,
    error: *mut TcBytes,
) -> i32 {
    guarded(error, || {
        let config = text_of(config, "tokenizer_config.json", Fault::bad_file)?;
        let jinja = text_of(jinja, "chat_template.jinja", Fault::bad_file)?;
        let template = ChatTemplate::new((*tokenizer).0.clone(), config, jinja)?;
        out.write(template.map_or(std::ptr::null_mut(), |template| Box::into_raw(Box::new(TcTemplate(template)))));
        Ok(())
    })
}

/// # Safety
/// `template` is null or came from tc_template_new and is not used again.
#[no_mangle]
pub unsafe extern "C" fn tc_template_free(template: *mut TcTemplate) {
    if !template.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(template))));
    }
}

/// # Safety
/// `request` holds readable ranges that live for `'a`.
unsafe fn request_of<'a>(request: *const TcChatRequest) -> Fallible<ChatRequest<'a>> {
    let request = &*request;
    Ok(ChatRequest {
        messages: text_of(request.messages, "messages", Fault::invalid)?,
        tools: text_of(request.tools, "tools", Fault::invalid)?,
        kwargs: text_of(request.kwargs, "chat_template_kwargs", Fault::invalid)?,
        add_generation_prompt: request.add_generation_prompt,
        continue_final_message: request.continue_final_message,
    })
}

/// # Safety
/// `template` is a live template, `request` readable, `text` writable.
#[no_mangle]
pub unsafe extern "C" fn tc_template_render(
    template: *const TcTemplate,
    request: *const TcChatRequest,
    text: *mut TcBytes,
    error: *mut TcBytes,
) -> i32 {
    guarded(error, || {
        let rendered = (*template).0.render(&request_of(request)?)?;
        text.write(TcBytes::new(rendered.into_bytes()));
        Ok(())
    })
}

/// # Safety
/// `template` is a live template, `request` and `limits` readable (`limits` may be null), `ids` and `text` writable.
#[no_mangle]
pub unsafe extern "C" fn tc_template_encode(
    template: *const TcTemplate,
    request: *const TcChatRequest,
    limits: *const TcLimits,
    ids: *mut TcIds,
    text: *mut TcBytes,
    error: *mut TcBytes,
) -> i32 {
    guarded(error, || {
        let (encoded, rendered) = (*template).0.encode(&request_of(request)?, &limits_of(limits))?;
        ids.write(TcIds::new(encoded));
        text.write(TcBytes::new(rendered.into_bytes()));
        Ok(())
    })
}

/// # Safety
/// `bytes` came from this library and is not used again.
#[no_mangle]
pub unsafe extern "C" fn tc_bytes_free(bytes: TcBytes) {
    if bytes.capacity > 0 {
        drop(Vec::from_raw_parts(bytes.data, bytes.len, bytes.capacity));
    }
}

/// # Safety
/// `ids` came from this library and is not used again.
#[no_mangle]
pub unsafe extern "C" fn tc_ids_free(ids: TcIds) {
    if ids.capacity > 0 {
        drop(Vec::from_raw_parts(ids.data, ids.len, ids.capacity));
    }
}
