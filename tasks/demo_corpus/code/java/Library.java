import java.util.HashSet;
import java.util.Set;

public class Library {
    private final Set<String> onShelf = new HashSet<>();
    private final Set<String> lent = new HashSet<>();

    public void acquire(String title) {
        onShelf.add(title);
    }

    public boolean lend(String title) {
        // Only a book that is on the shelf can leave it.
        return onShelf.remove(title) && lent.add(title);
    }

    public boolean giveBack(String title) {
        return lent.remove(title) && onShelf.add(title);
    }

    public int available() {
        return onShelf.size();
    }
}
