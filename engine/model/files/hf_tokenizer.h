// Hugging Face's tokenizer.json and the files around it, as a Vocabulary.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "engine/model/files/json_keys.h"
#include "engine/model/text/vocabulary.h"

namespace espalier {

// Reads tokenizer.json and, where they are, tokenizer_config.json, generation_config.json and
// chat_template.jinja of `folder`. `config` is its config.json; `size` its number of embedding
// rows, to which the tokens are filled up as unused. Unimplemented, naming the part, if text would
// be cut in another way than the model was trained with.
absl::StatusOr<Vocabulary> ReadHfVocabulary(const std::string& folder, const Json& config,
                                            int size);

}  // namespace espalier
