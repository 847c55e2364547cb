// vLLM's dotted form of JSON options: --eplb-config.window_size 1000 is --eplb-config '{"window_size":1000}'.
#pragma once

#include <string>
#include <vector>

#include "src/base/options.h"

namespace tandem {

// `arguments` with every "--<object option>.<field> <value>" (or "=<value>") taken out and put, with the object given
// as a whole if there is one, into one "--<object option> <JSON>" at the end. A value is what it reads as in JSON, else
// text. A field given twice, or inside the object too, is an error. Other arguments pass unchanged.
Result<std::vector<std::string>> fold_dotted_options(Subcommand command, const std::vector<std::string>& arguments);

}  // namespace tandem
