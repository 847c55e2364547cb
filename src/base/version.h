#pragma once

namespace tandem {

inline constexpr const char* kVersion = "0.1.0";  // of the program, as in CMakeLists.txt

}  // namespace tandem
