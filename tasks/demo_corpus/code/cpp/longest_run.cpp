#include <cassert>
#include <string>
#include <utility>

// Finds the letter that is repeated most often in a row.
std::pair<char, int> longest_run(const std::string& text) {
    std::pair<char, int> best{'\0', 0};
    int run = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const bool same = i > 0 && text[i] == text[i - 1];
        run = same ? run + 1 : 1;
        if (run > best.second) {
            best = {text[i], run};
        }
    }
    return best;
}

int main() {
    assert(longest_run("abbbcc").second == 3);
    assert(longest_run("").second == 0);
}
