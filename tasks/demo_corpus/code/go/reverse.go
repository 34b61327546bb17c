package main

import (
	"fmt"
	"strings"
)

// reverse works on runes, so accented letters survive.
func reverse(s string) string {
	r := []rune(s)
	for i, j := 0, len(r)-1; i < j; i, j = i+1, j-1 {
		r[i], r[j] = r[j], r[i]
	}
	return string(r)
}

func reverseWords(s string) string {
	words := strings.Fields(s)
	for i, w := range words {
		words[i] = reverse(w)
	}
	return strings.Join(words, " ")
}

func main() {
	fmt.Println(reverse("crème brûlée"))
	fmt.Println(reverseWords("small boats sail home"))
}
