import java.util.LinkedHashMap;
import java.util.Map;

public class ShoppingList {
    private final Map<String, Double> items = new LinkedHashMap<>();

    public void add(String name, double price) {
        items.merge(name, price, Double::sum);
    }

    public double total() {
        return items.values().stream().mapToDouble(Double::doubleValue).sum();
    }

    public static void main(String[] args) {
        ShoppingList list = new ShoppingList();
        list.add("bread", 2.40);
        list.add("apples", 3.15);
        System.out.printf("Total: %.2f%n", list.total());
    }
}
