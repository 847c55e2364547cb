// JSON by hand for what is written once per token: appending to one string is several times faster than building a
// document. Reading, and everything rare, uses nlohmann's library.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace tandem::api {

// Appends `text` in quotes. Bytes that are not UTF-8 become U+FFFD, so the output is always valid JSON.
void append_json_string(std::string& out, std::string_view text);
// Shortest text that reads back to the same number. Infinities and NaN, which JSON lacks, are the caller's to avoid.
void append_json_number(std::string& out, float value);
void append_json_number(std::string& out, double value);
void append_json_number(std::string& out, int64_t value);

// Code points in `text`, counting every invalid byte as one.
int64_t count_code_points(std::string_view text);

}  // namespace tandem::api
