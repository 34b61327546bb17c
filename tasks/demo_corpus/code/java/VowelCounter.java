import java.util.Map;
import java.util.TreeMap;

public class VowelCounter {
    private static final String VOWELS = "aeiou";

    public static Map<Character, Integer> count(String text) {
        Map<Character, Integer> result = new TreeMap<>();
        for (char c : text.toLowerCase().toCharArray()) {
            if (VOWELS.indexOf(c) >= 0) {
                result.put(c, result.getOrDefault(c, 0) + 1);
            }
        }
        return result;
    }

    public static void main(String[] args) {
        System.out.println(count("A quiet evening by the river"));
    }
}
