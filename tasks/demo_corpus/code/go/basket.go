package main

import "fmt"

// Item is one line of the basket, with its price in cents.
type Item struct {
	Name     string
	Cents    int
	Quantity int
}

// Basket is a list of items.
type Basket []Item

// Total returns the price of everything in the basket.
func (b Basket) Total() int {
	sum := 0
	for _, item := range b {
		sum += item.Cents * item.Quantity
	}
	return sum
}

func main() {
	b := Basket{{"tea", 349, 1}, {"lemon", 45, 4}}
	fmt.Printf("%d.%02d\n", b.Total()/100, b.Total()%100)
}
