/* textcore: tokenizer, chat template and incremental detokenizer as a C interface.
 *
 * Rules of ownership
 *  - tc_slice borrows: the callee reads it during the call and keeps nothing. Exceptions are said at the function.
 *  - tc_bytes and tc_ids are owned by the caller, who frees each exactly once with tc_bytes_free or tc_ids_free.
 *    They are written only if the function returns TC_OK.
 *  - `error` may be NULL. It is written only if the function does not return TC_OK; the text is for people, is UTF-8 and
 *    is owned by the caller like any tc_bytes.
 *  - Handles are freed once by their own free function; freeing NULL does nothing. Templates and streams keep their own
 *    share of the tokenizer they were made from, so the tokenizer may be freed before them.
 * Threads: a tokenizer and a template may be used by any number of threads at once. A stream belongs to one thread at a
 * time. No function calls back, and no panic or exception leaves a function.
 * Text is UTF-8 of any content, NUL included; invalid UTF-8 is an error of the call. */
#ifndef TEXTCORE_H_
#define TEXTCORE_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum tc_status {
  TC_OK = 0,
  TC_INVALID = 1,      /* the text, the messages or an option is at fault */
  TC_BAD_FILE = 2,     /* a model file is damaged or contradicts itself */
  TC_UNSUPPORTED = 3,  /* the file is sound, but cannot be handled exactly */
  TC_INTERNAL = 4,     /* a fault of this library */
  TC_TOO_LONG = 5,     /* the text has more tokens than tc_limits allows; `error` goes on after "the prompt has" */
  TC_STOPPED = 6       /* tc_limits.stop was set */
};

typedef struct tc_slice {
  const uint8_t* data; /* may be NULL if len is 0 */
  size_t len;
} tc_slice;

typedef struct tc_bytes {
  uint8_t* data;
  size_t len;
  size_t capacity;
} tc_bytes;

typedef struct tc_ids {
  uint32_t* data;
  size_t len;
  size_t capacity;
} tc_ids;

void tc_bytes_free(tc_bytes bytes);
void tc_ids_free(tc_ids ids);

/* ---- tokenizer ---- */

typedef struct tc_tokenizer tc_tokenizer;

typedef struct tc_tokenizer_info {
  uint32_t vocab_size; /* one past the highest id that has a token */
  int64_t bos;         /* -1 if there is none */
  int64_t eos;
} tc_tokenizer_info;

enum tc_token_flag {
  TC_TOKEN_KNOWN = 1,   /* the id has a token */
  TC_TOKEN_SPECIAL = 2, /* dropped by skip_special_tokens */
  TC_TOKEN_CONTROL = 4  /* never made from user text: special tokens and those of the shape <|...|> */
};

/* tokenizer.json and tokenizer_config.json (may be empty) -> *out. */
int32_t tc_tokenizer_new(tc_slice tokenizer_json, tc_slice tokenizer_config_json, tc_tokenizer** out, tc_bytes* error);
void tc_tokenizer_free(tc_tokenizer* tokenizer);
void tc_tokenizer_get_info(const tc_tokenizer* tokenizer, tc_tokenizer_info* out);
/* tc_token_flag bits; 0 for an id without a token. */
uint32_t tc_token_flags(const tc_tokenizer* tokenizer, uint32_t id);
/* The raw bytes of a token, empty for an id without one. Valid as long as the tokenizer. */
tc_slice tc_token_bytes(const tc_tokenizer* tokenizer, uint32_t id);
/* The same as text, with U+FFFD for what is not UTF-8. */
int32_t tc_token_text(const tc_tokenizer* tokenizer, uint32_t id, tc_bytes* out, tc_bytes* error);
/* Bounds of one encoding. */
typedef struct tc_limits {
  size_t max_tokens; /* text that certainly has more is refused before it is encoded (TC_TOO_LONG) */
  const bool* stop;  /* may be NULL; another thread may set it, atomically, during the call */
} tc_limits;

/* Ids of text that a user wrote: no control token comes out of it, whatever it says. `limits` may be NULL. */
int32_t tc_encode(const tc_tokenizer* tokenizer, tc_slice text, bool add_special_tokens, const tc_limits* limits,
                  tc_ids* out, tc_bytes* error);
/* Text of `count` ids; ids without a token stand for nothing, invalid UTF-8 becomes U+FFFD. */
int32_t tc_decode(const tc_tokenizer* tokenizer, const uint32_t* ids, size_t count, bool skip_special_tokens,
                  tc_bytes* out, tc_bytes* error);

/* ---- incremental detokenizer ---- */

typedef struct tc_stream tc_stream;

/* `continues`: the text follows other text, so the decoder's rules for a text's start (dropping its first space) are off.
 * All outputs of push and finish put together equal tc_decode of all ids if `continues` is false. */
int32_t tc_stream_new(const tc_tokenizer* tokenizer, bool skip_special_tokens, bool continues, tc_stream** out,
                      tc_bytes* error);
void tc_stream_free(tc_stream* stream);
/* *text: what became certain, whole characters only; borrowed from the stream until its next call. */
int32_t tc_stream_push(tc_stream* stream, uint32_t id, tc_slice* text, tc_bytes* error);
/* *text: what was still held back. No push may follow. */
int32_t tc_stream_finish(tc_stream* stream, tc_slice* text, tc_bytes* error);

/* ---- chat template ---- */

typedef struct tc_template tc_template;

typedef struct tc_chat_request {
  tc_slice messages; /* JSON list of objects; the order of keys is kept */
  tc_slice tools;    /* JSON list of objects, or empty */
  tc_slice kwargs;   /* JSON object of further template variables, or empty */
  bool add_generation_prompt;
  bool continue_final_message;
} tc_chat_request;

/* `jinja` (chat_template.jinja) wins over the field of tokenizer_config.json; *out is NULL if there is neither. */
int32_t tc_template_new(const tc_tokenizer* tokenizer, tc_slice tokenizer_config_json, tc_slice jinja, tc_template** out,
                        tc_bytes* error);
void tc_template_free(tc_template* chat);
/* The prompt as text. */
int32_t tc_template_render(const tc_template* chat, const tc_chat_request* request, tc_bytes* text, tc_bytes* error);
/* The prompt as ids, and as the text they stand for; `limits` may be NULL and hold for the ids. Control tokens in it come
 * from the template only. */
int32_t tc_template_encode(const tc_template* chat, const tc_chat_request* request, const tc_limits* limits, tc_ids* ids,
                           tc_bytes* text, tc_bytes* error);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* TEXTCORE_H_ */
